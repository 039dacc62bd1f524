"""The machine code of the CUDA kernels, compiled here for GPUs that are not: nvcc is needed.

`python -m benchmarks.machine_code.cuda_code` prints:
for every instance of a kernel, what a thread and a block
need and the instructions of its busiest loop.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from .read import disassemble, opcode

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc/cuda"
CACHE = ROOT / "build/cuda_code"
ARCHITECTURES = (80, 90)
# Those of setup.py and what torch adds to them.
FLAGS = ("-O3", "-std=c++17", *COMMON_NVCC_FLAGS)
COMPILERS = 2
PATCH_CHUNK = 16
PATCHES_PER_WARP = 8
WARP = 32


@dataclass(frozen=True)
class Code:
    """One instance of a kernel.

    `spill_stores` and `spill_loads` are bytes a thread, `shared_bytes` those that do not depend on
    the launch. `loop` counts the instructions of the busiest loop by opcode, as one warp executes
    them in one iteration; `per_hidden_output` is their sum over the hidden outputs of a thread,
    None where the name does not tell how many these are. `instructions` is the length of all code.
    """

    registers: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    loop: Counter
    per_hidden_output: float | None
    instructions: int

    def figures(self) -> dict[str, int]:
        """What a budget limits."""
        return {
            "registers": self.registers,
            "spill_stores": self.spill_stores,
            "spill_loads": self.spill_loads,
            "shared_bytes": self.shared_bytes,
            "loop": self.loop.total(),
        }


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    for tool in ("nvcc", "c++filt"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    return None


@cache
def nvcc_version() -> str:
    """Of the compiler that `codes_of` uses, such as 13.0.88."""
    printed = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    return re.search(r"release .*V([\d.]+)", printed.stdout)[1]


def sources() -> list[Path]:
    """The files with kernels."""
    return sorted(SOURCES.glob("*/*.cu"))


def all_codes(architectures: Iterable[int]) -> dict[tuple[str, int], dict[str, Code]]:
    """`codes_of` every file for every architecture."""
    work = [(path, architecture) for architecture in architectures for path in sources()]
    with ThreadPoolExecutor(COMPILERS) as pool:
        parts = pool.map(lambda pair: codes_of(*pair), work)
        return {(path.name, number): part for (path, number), part in zip(work, parts, strict=True)}


@cache
def codes_of(path: Path, architecture: int) -> dict[str, Code]:
    """Every instance of the kernels of one file, by its name.

    Raises:
        RuntimeError: it does not compile.
    """
    cubin, log = _compile(path, architecture)
    listings = disassemble(cubin)
    needs = dict(_needs(log))
    assert listings.keys() == needs.keys()
    names = instance_names(listings)
    assert len(set(names.values())) == len(listings), "two instances have one name"
    return {
        names[mangled]: Code(
            **needs[mangled],
            loop=(loop := Counter(map(opcode, listing.busiest_loop()))),
            per_hidden_output=_per_hidden_output(names[mangled], loop),
            instructions=len(listing.instructions),
        )
        for mangled, listing in listings.items()
    }


def _compile(path: Path, architecture: int) -> tuple[bytes, str]:
    """The cubin, and what ptxas says of it; from the cache where the same text was compiled."""
    digest = hashlib.sha256(f"{nvcc_version()} {architecture} {path.name} {FLAGS}".encode())
    headers = [*SOURCES.parent.glob("*.h"), *SOURCES.rglob("*.h"), *SOURCES.rglob("*.cuh")]
    for file in [path, *sorted(headers)]:
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    cubin = CACHE / f"{path.stem}-sm_{architecture}-{digest.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".log")
    with open(cubin.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            new = cubin.with_suffix(".new")
            command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v"]
            # A relative path, since nvcc makes names of it.
            source = path.relative_to(ROOT)
            done = subprocess.run(
                [*command, "-o", str(new), str(source)], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                message = "\n".join(
                    [f"{path.name} does not compile for sm_{architecture}:", *errors]
                )
                raise RuntimeError(message)
            os.replace(new, cubin)
            log.write_text(done.stderr)
    return cubin.read_bytes(), log.read_text()


def _needs(log: str) -> Iterable[tuple[str, dict[str, int]]]:
    """(mangled name, what ptxas -v says of it)."""
    for part in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        yield (
            part[: part.index("'")],
            {
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "stack_bytes": int(stack),
                "spill_stores": int(stores),
                "spill_loads": int(loads),
                "shared_bytes": int(shared[1]) if shared else 0,
            },
        )


def instance_names(mangled: Iterable[str]) -> dict[str, str]:
    """Short names, such as inverted_residual_generic<float, GenericSizes<8, 1>>, by mangled one."""
    mangled = list(mangled)
    text = "\n".join(mangled)
    plain = subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True)
    return {
        before: _short_name(after)
        for before, after in zip(mangled, plain.stdout.splitlines(), strict=True)
    }


def _short_name(signature: str) -> str:
    """Without what it returns, its parameters and namespaces, of which one is a hash."""
    name = signature.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.sub(r"\w+::", "", name[: name.index("(")]).replace("> >", ">>")


def _per_hidden_output(name: str, loop: Counter) -> float | None:
    """An iteration of the patch kernel makes a chunk of channels of every pixel of its patches."""
    patch = re.match(r"inverted_residual_patch<.*PatchSizes<.*, (\d+), (\d+)>", name)
    if patch is None:
        return None
    pixels = int(patch[1]) * int(patch[2]) * PATCHES_PER_WARP
    return loop.total() * WARP / (pixels * PATCH_CHUNK)


def write_budget(path: Path) -> None:
    """What the nvcc of this machine makes of the kernels, for a test to hold it to."""
    rows: dict[str, dict] = {}
    for (source, architecture), codes in all_codes(ARCHITECTURES).items():
        for name, code in sorted(codes.items()):
            instance = rows.setdefault(source, {}).setdefault(name, {})
            instance[f"sm_{architecture}"] = code.figures()
    path.write_text(json.dumps({"nvcc": nvcc_version(), "rows": rows}, indent=1) + "\n")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES)
    parser.add_argument("--budget", type=Path, help="write the figures of all instances instead")
    options = parser.parse_args(arguments)
    if reason := why_not():
        parser.exit(1, f"{parser.prog}: {reason}\n")
    if options.budget:
        write_budget(options.budget)
        return
    architectures = [options.architecture] if options.architecture else ARCHITECTURES
    codes = all_codes(architectures)
    for architecture in architectures:
        print(
            f"sm_{architecture}, nvcc {nvcc_version()}\n{'instance':62} registers spilled shared"
            "   code  loop  a hidden output  most of it"
        )
        for source in sources():
            for name, code in sorted(codes[source.name, architecture].items()):
                print(_line(name, code))


def _line(name: str, code: Code) -> str:
    share = f"{code.per_hidden_output:.2f}" if code.per_hidden_output else "-"
    spilled = f"{code.spill_stores}/{code.spill_loads}"
    most = ", ".join(f"{count} {name}" for name, count in code.loop.most_common(5))
    return (
        f"{name.removeprefix('inverted_residual_'):62} {code.registers:9} {spilled:>7}"
        f" {code.shared_bytes:6} {code.instructions:6} {code.loop.total():5} {share:>16}  {most}"
    )


if __name__ == "__main__":
    main()
