"""Choose the configurations of the patch kernel and write them to a table.

    python -m benchmarks.gpu.tune_triton             on a GPU: the fastest of the most promising
    python -m benchmarks.gpu.tune_triton --estimate  anywhere: from machine code for sm_90 alone

A table holds the 17 blocks of MobileNetV2 in all three dtypes; `configs.fallback` knows the rest.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import inf
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.testing import do_bench_cudagraph

from mnv2_kernels.block.config import BlockConfig
from mnv2_kernels.block.fold import FoldedWeights
from mnv2_kernels.ops import reference
from mnv2_kernels.ops.inverted_residual import op_arguments
from mnv2_kernels.ops.triton import configs, launch
from mnv2_kernels.ops.triton.configs import PatchConfig
from mnv2_kernels.profiling.verify import example

from ..harness import distinct_blocks
from ..machine_code.triton_code import (
    ARCHITECTURES,
    ARITHMETIC,
    WARP,
    Code,
    arithmetic,
    compile_block,
    describe,
)

# No table holds a configuration that spills more.
MOST_SPILL_BYTES = 64
BATCH = 256
# What PyTorch's own layers are within 1 of; a tap or a channel too few is beyond 50 even in bf16.
MOST_SPACINGS = 8
SPACING = {"float16": 2**-10, "bfloat16": 2**-7, "tf32": 2**-10}
# Of 255, for sums and hidden values.
MOST_REGISTERS = 200

# (patch_h, patch_w), and (patches, chunk, num_warps): few output channels are no work for many
# warps, and many too much for one.
FEW = ((2, 2), (2, 4), (1, 4), (1, 2)), ((16, 16, 1), (32, 16, 1), (32, 16, 2), (32, 32, 2))
MANY = ((2, 2), (1, 2), (1, 4), (1, 7), (2, 7)), ((16, 64, 4), (16, 64, 8), (32, 64, 8))
# One streaming multiprocessor of compute capability 9.0: registers and programs it holds, and
# cycles a warp's instruction occupies what it needs most. A matrix product of 16x8x16 takes what
# mma.sync reaches, 62 % of the peak.
REGISTERS, MOST_PROGRAMS = 65536, 32
MULTIPROCESSORS, CYCLES_A_MICROSECOND = 132, 1755
PRODUCT_CYCLES = 1.5
SHARED_CYCLES = {"LDSM": 4, "LDS": 2, "STS": 3}
HALF_RATE = ("F2FP", "FMNMX", "HMNMX2", "ISETP", "LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SHF")
# Fewer warps than this leave latencies in the open.
ENOUGH_WARPS = 10


@dataclass(frozen=True, eq=False)
class Candidate:
    """A configuration of a block (x of size x size) and the time expected of it."""

    block: BlockConfig
    size: int
    arithmetic: str
    config: PatchConfig
    code: Code
    microseconds: float


def candidates(block: BlockConfig, size: int, dtype: torch.dtype) -> Iterator[PatchConfig]:
    """Configurations that can be expected to fit the registers and shared memory of a GPU."""
    height_out, width_out = block.output_hw(size, size)
    base = configs.fallback(block, dtype).config
    few = block.out_channels <= 32
    # One tile with waste, or several without; weights loaded ahead or not.
    tiles = {base.out_tile, block.out_channels & -block.out_channels} if few else {base.out_tile}
    for (patch_h, patch_w), (patches, chunk, warps), out_tile, stages in product(
        *(FEW if few else MANY), sorted(tiles), (1, 2) if few else (1,)
    ):
        if patch_w > width_out or patch_h > height_out or block.hidden_channels % chunk:
            continue
        # Whole rows pay where nothing is left over.
        if patch_w == 7 and width_out not in (7, 14):
            continue
        config = replace(
            base,
            patches=patches,
            patch_h=patch_h,
            patch_w=patch_w,
            chunk=chunk,
            out_tile=out_tile,
            out_tiles=-(-block.out_channels // out_tile),
            keep_x=True,
            num_warps=warps,
            num_stages=stages,
        )
        fits = configs.shared_bytes(block, config, dtype) <= configs.SHARED_BYTES
        if fits and configs.registers(config) <= MOST_REGISTERS:
            yield config


def estimate(block: BlockConfig, size: int, config: PatchConfig, code: Code) -> float:
    """Microseconds an image: the busiest resource of a multiprocessor, and some of the others."""
    loop, warps = code.hidden_loop, config.num_warps
    busy = (
        loop.total() / 4,
        loop["HMMA"] * PRODUCT_CYCLES,
        sum(loop[name] * cycles for name, cycles in SHARED_CYCLES.items()),
        sum(loop[name] for name in HALF_RATE) / 2,
    )
    an_iteration = max(busy) + (sum(busy) - max(busy)) / 4
    iterations = -(-block.hidden_channels // config.chunk)
    # Outside the loop are the waits for x and for y.
    a_program = warps * (iterations * an_iteration + 1.5 * code.outside / 4)
    height_out, width_out = block.output_hw(size, size)
    tiles = -(-height_out // config.patch_h) * -(-width_out // config.patch_w) / config.patches
    groups = -(-block.out_channels // (config.out_tile * config.out_tiles))
    resident = warps * min(
        REGISTERS // (-(-code.registers // 8) * 8 * warps * WARP),
        configs.SHARED_BYTES // (code.shared_bytes + 1024),
        MOST_PROGRAMS,
    )
    exposed = max(1, ENOUGH_WARPS / max(resident, 1)) ** 0.5
    return a_program * tiles * groups * exposed / MULTIPROCESSORS / CYCLES_A_MICROSECOND


def compiled(work: tuple[BlockConfig, int, str, PatchConfig]) -> Candidate | None:
    """The candidate with its code for sm_90; None where it fits no GPU, or spills on any."""
    block, size, name, config = work
    with arithmetic(name) as dtype:
        for architecture in ARCHITECTURES:
            try:
                code = compile_block(block, size, dtype, config, architecture)
            except triton.CompilationError:
                return None
            if code.spill_bytes > MOST_SPILL_BYTES:
                return None
    return Candidate(block, size, name, config, code, estimate(block, size, config, code))


def ranked(pool: Executor, name: str, only: str = "") -> Iterator[list[Candidate]]:
    """For every block with `only` in its name: the candidates, the most promising first."""
    for block, size in distinct_blocks():
        if only in block.name:
            with arithmetic(name) as dtype:
                work = [(block, size, name, c) for c in candidates(block, size, dtype)]
            found = [c for c in pool.map(compiled, work) if c is not None]
            yield sorted(found, key=lambda c: c.microseconds)


def loading_ahead(pool: Executor, promising: list[Candidate]) -> list[Candidate]:
    """The same with weights loaded an iteration ahead: machine code does not tell its worth."""
    work = [
        (c.block, c.size, c.arithmetic, replace(c.config, num_stages=2))
        for c in promising
        if c.config.num_stages == 1
    ]
    return [c for c in pool.map(compiled, work) if c is not None]


def prepared(candidate: Candidate) -> None:
    """Compile the candidate for this GPU, into Triton's cache on disk."""
    with arithmetic(candidate.arithmetic) as dtype:
        on_gpu(candidate, *workload(candidate, dtype, batch=1))()


def workload(candidate: Candidate, dtype: torch.dtype, batch: int) -> tuple[Tensor, FoldedWeights]:
    """x (channels_last) and weights on the GPU."""
    size = candidate.size
    x, weights = example(candidate.block, 2, size, size, seed=0, dtype=dtype)
    x = x.to("cuda").repeat(-(-batch // 2), 1, 1, 1)[:batch]
    return x.to(memory_format=torch.channels_last), weights.to("cuda")


def on_gpu(candidate: Candidate, x: Tensor, weights: FoldedWeights) -> Callable[[], Tensor]:
    arguments = op_arguments(weights, candidate.block)
    return lambda: launch.inverted_residual(x, *arguments, config=candidate.config)


def largest_error(candidate: Candidate, dtype: torch.dtype) -> float:
    """Against float64, over the largest value, in spacings of the arithmetic at 1."""
    block, (x, weights) = candidate.block, workload(candidate, dtype, batch=2)
    truth = reference.inverted_residual(
        x.double(),
        weights.to(torch.float64),
        stride=block.stride,
        padding=block.padding,
        dilation=block.dilation,
        residual=block.residual,
    )
    error = (on_gpu(candidate, x, weights)() - truth).abs().max() / truth.abs().max()
    return error.item() / SPACING[candidate.arithmetic]


def measured(pool: Executor, tried: list[Candidate]) -> dict[Candidate, float]:
    """Microseconds an image on the GPU of every candidate that is right; the others are named."""
    times = {}
    for candidate, preparing in [(c, pool.submit(prepared, c)) for c in tried]:
        try:
            preparing.result()
            with arithmetic(candidate.arithmetic) as dtype:
                error = largest_error(candidate, dtype)
                if not error <= MOST_SPACINGS:
                    raise ValueError(f"wrong by {error:.0f} spacings")
                run = on_gpu(candidate, *workload(candidate, dtype, BATCH))
                times[candidate] = do_bench_cudagraph(run, return_mode="median") * 1e3 / BATCH
        except (RuntimeError, ValueError, triton.runtime.OutOfResources) as reason:
            print(f"{describe(candidate.config)}: left out: {reason}", flush=True)
    return times


def by_width(
    promising: list[Candidate], time_of: Callable[[Candidate], float]
) -> Iterator[tuple[str, Candidate]]:
    """(key, best): the best for any width, and the best of all where it needs this very one."""
    any_width = [c for c in promising if c.config.patch_w <= 4]
    for chosen, suffix in ((any_width, ""), (promising, "@{}")):
        best = min(chosen, key=time_of, default=None)
        if best is None or (suffix and best in any_width):
            continue
        with arithmetic(best.arithmetic) as dtype:
            key = configs.key(best.block, dtype)
        yield key + suffix.format(best.block.output_hw(best.size, best.size)[1]), best


def tune(
    out: Path,
    *,
    minutes: float = inf,
    workers: int = os.cpu_count() or 1,
    tried: int = 6,
) -> Path:
    """Write the table of this GPU into `out`, as far as the minutes go; returns its path.

    Blocks that were not reached are left to the architecture's table.
    """
    gpu, deadline = configs.gpu_name(torch.device("cuda")), time.monotonic() + 60 * minutes
    rows: dict[str, dict] = {}
    path = write(out / f"{gpu}.json", f"the fastest at batch {BATCH} on {gpu}", rows)
    with processes(workers) as pool:
        for name in ARITHMETIC:
            for promising in ranked(pool, name):
                first = promising[:tried]
                times = measured(pool, first + loading_ahead(pool, first))
                for key, best in by_width(list(times), times.get):
                    rows[key] = asdict(best.config)
                    print(line(key, best, times[best]), flush=True)
                # Written now, since this process may be killed.
                write(path, f"the fastest at batch {BATCH} on {gpu}", rows)
                if time.monotonic() > deadline:
                    return path
    return path


def estimate_table(out: Path, *, workers: int = 1, only: str = "") -> Path:
    """Write the table of sm_90 into `out`; returns its path.

    `only` chooses anew for the blocks that have it in their names and keeps the rest of the table.
    """
    path = out / "sm_90.json"
    rows = json.loads(path.read_text())["configs"] if only else {}
    with processes(workers) as pool:
        for name in ARITHMETIC:
            for promising in ranked(pool, name, only):
                for key, best in by_width(promising, lambda c: c.microseconds):
                    rows[key] = asdict(best.config)
                    print(line(key, best, best.microseconds), flush=True)
    return write(path, "estimated from machine code for sm_90, not measured", rows)


def processes(number: int) -> Executor:
    """Fresh ones: a process that has used CUDA cannot be forked."""
    return ProcessPoolExecutor(number, mp_context=get_context("spawn"))


def line(key: str, candidate: Candidate, microseconds: float) -> str:
    """What was chosen for a block, and its time an image."""
    return f"{key:30} {describe(candidate.config):36} {microseconds:.3f} us an image"


def write(path: Path, how: str, rows: dict[str, dict]) -> Path:
    """A table as `configs.load` reads it."""
    table = {"how": how, "triton": triton.__version__, "configs": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--estimate", action="store_true", help="needs no GPU")
    parser.add_argument("--only", default="", help="with --estimate: of blocks with this name")
    parser.add_argument("--out", type=Path, default=configs.TABLES)
    parser.add_argument("--minutes", type=float, default=inf)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.estimate:
        path = estimate_table(options.out, workers=options.workers, only=options.only)
    else:
        path = tune(options.out, minutes=options.minutes, workers=options.workers)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
