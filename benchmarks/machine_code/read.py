"""Machine code of compiled kernels, read with the tools that Triton brings: no GPU is needed."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MULTIPLY_ADDS = ("FFMA", "HFMA2", "HMMA")


@dataclass(frozen=True)
class Listing:
    """The instructions of one kernel, and its loops as (first instruction, one past the last)."""

    instructions: list[str]
    loops: list[tuple[int, int]]

    def longest_loop(self) -> list[str]:
        """The instructions of the longest loop; all of them where there is no loop."""
        return self._longest(self.loops)

    def busiest_loop(self) -> list[str]:
        """The innermost loop with the most multiply-adds, and the longest of several."""
        innermost = [
            loop
            for loop in self.loops
            if not any(loop != inner and _within(inner, loop) for inner in self.loops)
        ]
        counts = [self._multiply_adds(loop) for loop in innermost]
        most = max(counts, default=0)
        return self._longest(
            [loop for loop, count in zip(innermost, counts, strict=True) if count == most]
        )

    def _multiply_adds(self, loop: tuple[int, int]) -> int:
        return sum(opcode(i) in MULTIPLY_ADDS for i in self.instructions[slice(*loop)])

    def _longest(self, loops: list[tuple[int, int]]) -> list[str]:
        whole = (0, len(self.instructions))
        return self.instructions[slice(*max(loops, key=lambda x: x[1] - x[0], default=whole))]


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def disassemble(cubin: bytes) -> dict[str, Listing]:
    """What every kernel of a cubin consists of, by its mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", _run("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    return {name: read_listing(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread, for a cubin with one kernel."""
    usage = _run("cuobjdump", "-res-usage", cubin)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack


def read_listing(text: str) -> Listing:
    """One kernel as nvdisasm prints it."""
    labels, instructions = {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\S+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code[1].strip())
    # What follows the exit is padding and a branch to itself.
    # A kernel that only traps has none.
    exits = [i for i, text in enumerate(instructions) if opcode(text) == "EXIT"]
    last_exit = max(exits, default=len(instructions) - 1)
    instructions = instructions[: last_exit + 1]
    loops = []
    for i, text in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L\S+)\)", text)
        if target and labels.get(target[1], i + 1) <= i:
            loops.append((labels[target[1]], i + 1))
    return Listing(instructions, loops)


def opcode(instruction: str) -> str:
    """Without its predicate and suffixes: "@!P0 FFMA.FTZ R1, ..." is an FFMA."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
