"""The 17 blocks of MobileNetV2 at 224x224, one by one: fused, folded eager and eager."""

import os
import subprocess
import sys

import pytest
import torch

from mnv2_kernels.block import cost
from mnv2_kernels.profiling.timing import num_threads

from .. import harness
from ..machine import ROOT, instruction_set

THREADS = (1, 2) if (os.cpu_count() or 1) > 1 else (1,)
NUMBERS = range(1, 18)
# One process runs one instruction set; this variable chooses it for torch and for the kernels.
VARIABLE = "ATEN_CPU_CAPABILITY"
IS_CHILD = VARIABLE in os.environ


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("batch", (1, 8))
@pytest.mark.parametrize("threads", THREADS)
def test_block(benchmark, record, threads, batch, number):
    # Convolutions of oneDNN choose their instruction set themselves: nothing to compare with.
    rounds, repeats = (21, 5) if batch == 1 else (9, 2)
    record(
        harness.measure_block(
            number,
            batch=batch,
            threads=threads,
            rounds=rounds,
            repeats=repeats,
            only_fused=IS_CHILD,
        )
    )
    module, x, _ = harness.block_workload(number, batch)
    with torch.inference_mode(), num_threads(threads):
        benchmark.pedantic(module, (x,), rounds=5, iterations=repeats, warmup_rounds=1)


@pytest.mark.skipif(len(THREADS) == 1 or IS_CHILD, reason="needs two cores; once is enough")
@pytest.mark.parametrize("number", NUMBERS)
def test_two_threads_over_one(benchmark, record, number):
    config, size = harness.BLOCKS[number - 1]
    module, x, expected = harness.block_workload(number, 1)

    def call(threads: int) -> torch.Tensor:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return module(x)

    rows = harness.measure(
        {"1 thread": lambda: call(1), "2 threads": lambda: call(2)},
        x=x,
        expected=expected,
        flops=cost.flops(config, size, size),
        threads=2,
        rounds=21,
        repeats=5,
        suite="scaling",
        block=number,
        config=config.name,
        resolution=size,
    )
    for row, threads in zip(rows, (1, 2), strict=True):
        row |= {"threads": threads, "fma_peak_gflops": None, "share_of_fma_peak": None}
    record(rows)
    with torch.inference_mode():
        benchmark.pedantic(module, (x,), rounds=5, iterations=5)


@pytest.mark.skipif(IS_CHILD, reason="runs the other instruction sets of the same machine")
@pytest.mark.parametrize("capability", ("avx2", "default"))
def test_other_instruction_sets(benchmark, record, request, tmp_path, capability):
    if capability == instruction_set():
        pytest.skip("measured in this process")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "benchmarks/bench_block.py",
        "-k",
        "test_block",
    ]
    benchmark.pedantic(
        lambda: subprocess.run(
            [*command, "--benchmark-disable", f"--results={tmp_path}"],
            cwd=ROOT,
            env={**os.environ, VARIABLE: capability},
            check=True,
            stdout=subprocess.DEVNULL,
        ),
        rounds=1,
    )
    record(harness.load("block", tmp_path))
