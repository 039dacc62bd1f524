"""More than 2**31 elements in x, in the result, or in what is never expanded; very many images.

Most of a large x is pages that nobody has written: they read as zeros and take no memory. The
address arithmetic of the GPU kernels is in test_cuda_kernels.py and
test_triton_interpreted_mutants.py.
"""

import mmap
import os
from dataclasses import replace
from math import prod

import cases
import pytest
import torch
from cases import Case, expect, make_inputs, run, why_wrong
from torch import Tensor

import mnv2_kernels as mk
from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import BlockConfig

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs anonymous memory maps"),
    pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the extension"),
]
BEYOND = 2**31
NO_RESERVE = 0x4000  # of Linux: pages are not counted before they are written
CORNER = 8
WIDTH = 2048
# float32 takes twice the time and the same addresses.
DTYPES = (torch.bfloat16, torch.float32) if cases.LONG else (torch.bfloat16,)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
in_long_runs = pytest.mark.skipif(not cases.LONG, reason="in long runs alone (MNV2_LONG=1)")


def zeros(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """(N, C, H, W), channels_last, that takes the memory of what is written to it."""
    N, C, H, W = shape
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags)
    return torch.frombuffer(memory, dtype=dtype).view(N, H, W, C).permute(0, 3, 1, 2)


def needs_memory(gib: int) -> None:
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if free < gib * 2**20:
        pytest.skip(f"needs {gib} GiB of memory, {free / 2**20:.0f} are free")


def check_corners(case: Case, dtype: torch.dtype) -> None:
    """One image of zeros with values in two of its corners, and the same bits between those."""
    x = zeros((1, case.config.in_channels, case.height, case.width), dtype)
    values, weights = make_inputs(replace(case, batch=2, height=CORNER, width=CORNER), dtype)
    x[0, :, :CORNER, :CORNER], x[0, :, -CORNER:, -CORNER:] = values
    y = run("cpu", x, weights, **case.settings)
    # One pixel more than has values, whose window reaches none beyond.
    seen, size = replace(case, height=CORNER + 1, width=CORNER + 1), CORNER
    first = expect(seen, x[:, :, : CORNER + 1, : CORNER + 1].contiguous(), weights)
    inner = replace(first, truth=first.truth[:, :, :size, :size])
    assert why_wrong(y[:, :, :size, :size], inner) is None
    last = expect(seen, x[:, :, -CORNER - 1 :, -CORNER - 1 :].contiguous(), weights)
    inner = replace(last, truth=last.truth[:, :, 1:, 1:])
    assert why_wrong(y[:, :, -size:, -size:], inner) is None
    between = y[:, :, 2 * CORNER : -2 * CORNER, 2 * CORNER : -2 * CORNER].permute(0, 2, 3, 1)
    assert all(bool((rows == between[0, 0, 0]).all()) for rows in between[0].split(256))


@each_dtype
@pytest.mark.parametrize("expansion", [True, False])
def test_one_image(dtype, expansion):
    config = BlockConfig(64, 8 if expansion else 64, 2, expansion=expansion)
    case = Case(config, BEYOND // (64 * WIDTH) + 64, WIDTH)
    assert case.height * case.width * 64 > BEYOND
    check_corners(case, dtype)


@in_long_runs
def test_a_result():
    needs_memory(12)
    config = BlockConfig(2, 2, 64, expansion=False)
    check_corners(Case(config, BEYOND // (64 * WIDTH) + 64, WIDTH), torch.bfloat16)


def many(case: Case, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, FoldedWeights]:
    """(images of which the first and the last alone are not zeros, those two, weights)."""
    ends, weights = make_inputs(replace(case, batch=2), dtype)
    x = zeros((count, case.config.in_channels, case.height, case.width), dtype)
    x[0], x[-1] = ends
    return x, ends, weights


def check_many(case: Case, count: int, dtype: torch.dtype) -> None:
    x, ends, weights = many(case, count, dtype)
    y = run("cpu", x, weights, **case.settings)
    assert why_wrong(y[[0, -1]], expect(case, ends, weights)) is None
    assert all(bool((piece == y[1]).all()) for piece in y[1:-1].split(1 << 12))


@each_dtype
def test_images(dtype):
    case = Case(BlockConfig(128, 128, 3, stride=2, expansion=False), 64, 64)
    check_many(case, BEYOND // (128 * 64 * 64) + 3, dtype)


@each_dtype
def test_seventy_thousand_images(dtype):
    check_many(Case(BlockConfig(16, 48, 16, residual=True), 3, 4), 70_000, dtype)


@in_long_runs
@each_dtype
def test_hidden_channels(dtype):
    """The expanded tensor, were there one, would hold 3.1 * 10**9 elements."""
    check_many(Case(BlockConfig(16, 960, 16), 224, 224), 64, dtype)


@torch.no_grad()
def test_images_of_a_plan():
    case = Case(BlockConfig(128, 128, 8, stride=2), 32, 32)
    x, ends, _ = many(case, BEYOND // (128 * 32 * 32) + 3, torch.bfloat16)
    torch.manual_seed(0)
    chain = torch.nn.Sequential(
        mk.InvertedResidual(128, 8, stride=2, expand_ratio=1),
        mk.InvertedResidual(8, 8, stride=2, expand_ratio=1),
    )
    plan = mk.plan(chain.eval(), x.shape[1:], dtype=torch.bfloat16)
    y = plan(x)
    assert torch.equal(y[[0, -1]], plan(ends)) and not torch.equal(y[0], y[-1])
    zero = plan(torch.zeros_like(ends[:1]))
    assert all(bool((piece == zero).all()) for piece in y[1:-1].split(1 << 12))
