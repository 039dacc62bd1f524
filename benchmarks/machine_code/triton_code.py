"""The machine code of the patch kernel, compiled here for any architecture: no GPU is needed.

`python -m benchmarks.machine_code.triton_code` prints:
registers, spills, shared memory and the instructions of
the hidden loop for each hidden output (an element of the depthwise's result) of the 17 blocks.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig
from mnv2_kernels.ops.triton import configs
from mnv2_kernels.ops.triton.configs import PatchConfig
from mnv2_kernels.ops.triton.kernels.patch import inverted_residual_patch
from mnv2_kernels.ops.triton.launch import Launch, plan_launch

from ..harness import distinct_blocks
from .read import disassemble, opcode, resources

ARCHITECTURES = (80, 90)
# What the matrix products of the tables are computed in; float32 means IEEE's.
ARITHMETIC = ("float16", "bfloat16", "tf32")
WARP = 32

_TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_FP32_POINTERS = ("b", "b_expand", "b_dw", "b_project", "b_squeeze", "b_excite", "sums", "gate")
_POINTERS = ("x", "weight", "w_expand", "w_dw", "w_project", "y", "kept", "w_squeeze", "w_excite")


@dataclass(frozen=True)
class Code:
    """What one configuration was compiled to.

    `hidden_loop` counts the instructions of the loop over hidden channels by opcode, as one warp
    executes them in one iteration; `per_hidden_output` is their sum over the hidden outputs of a
    thread. `outside` counts the instructions before and after that loop.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    hidden_loop: Counter
    per_hidden_output: float
    outside: int

    def figures(self) -> dict[str, float]:
        """What a budget limits."""
        return {
            "registers": self.registers,
            "spill_bytes": self.spill_bytes,
            "shared_bytes": self.shared_bytes,
            "per_hidden_output": round(self.per_hidden_output, 2),
        }


@dataclass(frozen=True)
class TableRow:
    """A row of a committed table, and a block that runs with it (x of size x size)."""

    name: str
    block: BlockConfig
    size: int
    arithmetic: str
    config: PatchConfig


@contextmanager
def arithmetic(name: str) -> Iterator[torch.dtype]:
    """The dtype of x for a kind of arithmetic, with PyTorch's switch for TF32 set accordingly."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield torch.float32 if name == "tf32" else getattr(torch, name)
    finally:
        products.fp32_precision = before


def compile_launch(
    kernel, launch: Launch, dtype: torch.dtype, options: dict[str, int], architecture: int
) -> triton.compiler.CompiledKernel:
    """A kernel of the Triton backend for a launch, with all biases in fp32 and aligned tensors."""

    def kind(name: str) -> str:
        if name in launch.constants:
            return "constexpr"
        if name in _FP32_POINTERS:
            return "*fp32"
        if name in _POINTERS:
            return "*" + _TRITON_TYPES[dtype]
        return "fp32" if name.startswith(("lower", "upper")) else "i32"

    names = kernel.arg_names
    signature = {name: kind(name) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    return triton.compile(
        ASTSource(kernel, signature, launch.constants, aligned),
        target=GPUTarget("cuda", architecture, WARP),
        options=options,
    )


def compile_block(
    block: BlockConfig,
    size: int,
    dtype: torch.dtype,
    config: PatchConfig,
    architecture: int,
    curves: tuple[int, int, int] = (0, 0, 0),
) -> Code:
    """The code for x of size x size, with ReLU6 where there is no curve, all biases and aligned
    tensors.

    Raises:
        triton.CompilationError: the configuration needs more than a GPU can have.
    """
    clips = (RELU6 if block.expansion else NO_CLIP, RELU6, NO_CLIP)
    biases = (block.expansion, True, True)
    launch = plan_launch(block, biases, clips, (1, size, size), config, dtype, curves)

    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = compile_launch(inverted_residual_patch, launch, dtype, options, architecture)
    registers, spill_bytes = resources(compiled.asm["cubin"])
    (listing,) = disassemble(compiled.asm["cubin"]).values()
    loop = listing.longest_loop()
    threads = config.num_warps * WARP
    hidden_outputs = config.patches * config.patch_h * config.patch_w * config.chunk / threads
    return Code(
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        hidden_loop=Counter(map(opcode, loop)),
        per_hidden_output=len(loop) / hidden_outputs,
        outside=len(listing.instructions) - len(loop),
    )


def table_rows() -> Iterator[TableRow]:
    """Every row of every committed table."""
    for table in configs.table_names():
        rows = configs.load(table)
        for name, (block, size) in product(ARITHMETIC, distinct_blocks()):
            with arithmetic(name) as dtype:
                key = configs.key(block, dtype)
            for row in (key, f"{key}@{block.output_hw(size, size)[1]}"):
                if row in rows:
                    yield TableRow(f"{table}/{row}", block, size, name, rows[row])


def code_of(row: TableRow, architecture: int) -> Code:
    """A row's code."""
    with arithmetic(row.arithmetic) as dtype:
        return compile_block(row.block, row.size, dtype, row.config, architecture)


def write_budget(path: Path) -> None:
    """What the installed Triton makes of the tables, for a test to hold it to."""
    work = list(product(table_rows(), ARCHITECTURES))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        codes = pool.map(code_of, *zip(*work, strict=True))
    rows: dict[str, dict] = {row.name: {} for row, _ in work}
    for (row, architecture), code in zip(work, codes, strict=True):
        rows[row.name][f"sm_{architecture}"] = code.figures()
    path.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--arithmetic", choices=(*ARITHMETIC, "float32"))
    parser.add_argument("--budget", type=Path, help="write the figures of all tables instead")
    options = parser.parse_args(arguments)
    if options.budget:
        write_budget(options.budget)
        return
    print(
        f"{'block':28} {'configuration':34} registers spilled   shared  loop  outside"
        "  instructions a hidden output"
    )
    for name in [options.arithmetic] if options.arithmetic else ARITHMETIC:
        with arithmetic(name) as dtype:
            for block, size in distinct_blocks():
                print(_line(block, size, dtype, options.architecture), flush=True)


def _line(block: BlockConfig, size: int, dtype: torch.dtype, architecture: int) -> str:
    width_out = block.output_hw(size, size)[1]
    config = configs.choose(block, dtype, torch.device("cpu"), width_out).config
    code = compile_block(block, size, dtype, config, architecture)
    return (
        f"{configs.key(block, dtype):28} {describe(config):34} {code.registers:9}"
        f" {code.spill_bytes:7} {code.shared_bytes:8} {code.hidden_loop.total():5}"
        f" {code.outside:8}  {code.per_hidden_output:.1f}"
    )


def describe(config: PatchConfig) -> str:
    """A configuration in one short line."""
    return (
        f"{config.patches}x({config.patch_h}x{config.patch_w}) chunk {config.chunk}"
        f" warps {config.num_warps}" + " half" * config.half + " reread" * (not config.keep_x)
    )


if __name__ == "__main__":
    main()
