"""Checks of calls on a GPU, of the Triton and the CUDA backend."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import Case, expect, why_wrong
from triton_cases import make_inputs, run

from mnv2_kernels import FoldedWeights, inverted_residual
from mnv2_kernels.ops.backends import ran

GIB = 2**30


def needs_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / GIB:.0f} are free")


def unasked(case: Case, dtype: torch.dtype) -> str:
    """The backend that a call chooses by itself."""
    x, weights = make_inputs(case, dtype)
    before = ran()
    inverted_residual(x, weights, **case.settings)
    (name,) = ran() - before
    return name


def repeated(case: Case, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, FoldedWeights]:
    """One image many times, and then another one."""
    x, weights = make_inputs(replace(case, batch=2), dtype)
    x = x.permute(0, 2, 3, 1).contiguous()
    many = x[:1].expand(count, -1, -1, -1).contiguous()
    many[-1] = x[1]
    return many.permute(0, 3, 1, 2), weights


def check_repeated(case: Case, count: int, dtype: torch.dtype, run: Callable = run) -> None:
    x, weights = repeated(case, count, dtype)
    y = run(x, weights, **case.settings)
    ends = torch.stack([x[0], x[-1]])
    assert why_wrong(y[[0, -1]], expect(case, ends, weights)) is None
    # In pieces: a comparison of the whole would need its size in memory again.
    assert all(bool((piece == y[0]).all()) for piece in y[:-1].split(max(1, count // 64)))


def check_allocations(run, case: Case, dtype: torch.dtype) -> None:
    """A call of `run` takes memory for its result and for nothing else."""
    x, weights = make_inputs(case, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    run(x, weights, **case.settings)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    y = run(x, weights, **case.settings)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == y.nbytes
