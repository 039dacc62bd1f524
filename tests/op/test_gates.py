"""Blocks with a squeeze-excite on the CPU: values, and the same bits everywhere.

The shapes are those of real networks and some odd ones: depthwise results that are larger than the
weights of the projection and smaller ones, which the gate multiplies in their place; many chunks of
hidden channels; one pixel; wide rows.
"""

from dataclasses import replace
from functools import cache

import cases
import pytest
import torch
from cases import DTYPES, expect, run, why_wrong
from mbconv_blocks import MBConvCase
from rounding import multiplies_pairs, why_not_rounded_once
from torch import Tensor

from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig
from mnv2_kernels.ops import reference

pytestmark = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)

FIVE = {"kernel_size": 5, "padding": (2,) * 4}
SILU = {"between": ("silu", "silu", NO_CLIP), "squeeze": "silu", "scale": "sigmoid"}
CLIPS = {"between": (RELU, RELU, NO_CLIP)}


def gated(c_in: int, hidden: int, c_out: int, squeezed: int, **settings) -> BlockConfig:
    return BlockConfig(c_in, hidden, c_out, squeeze_channels=squeezed, **settings)


SHAPES = {
    "no expansion, stride 2": MBConvCase(
        gated(16, 16, 16, 8, stride=2, expansion=False), 28, 28, between=(NO_CLIP, RELU, NO_CLIP)
    ),
    "no expansion, residual": MBConvCase(
        gated(19, 19, 19, 3, expansion=False, residual=True),
        9,
        11,
        **SILU | {"between": (NO_CLIP, "silu", NO_CLIP)},
    ),
    "stride 2, 5x5": MBConvCase(gated(24, 72, 40, 24, stride=2, **FIVE), 28, 28, **CLIPS),
    "residual, many pixels": MBConvCase(gated(40, 240, 40, 64, residual=True, **FIVE), 14, 14),
    "672 channels": MBConvCase(gated(80, 672, 112, 168), 14, 14),
    "few pixels, residual": MBConvCase(gated(96, 576, 96, 144, residual=True, **FIVE), 7, 7),
    "1152 channels": MBConvCase(gated(192, 1152, 320, 48), 7, 7, **SILU),
    "one pixel": MBConvCase(gated(10, 70, 12, 1, **FIVE), 1, 1, **SILU),
    "odd": MBConvCase(gated(9, 37, 11, 5, stride=2, padding=(0, 1, 2, 1)), 13, 10),
    "wide": MBConvCase(gated(8, 40, 8, 2, residual=True), 12, 303, **SILU),
    "clips behind the projection": MBConvCase(
        gated(17, 51, 17, 7, residual=True), 15, 9, between=(RELU6, "hardswish", RELU6)
    ),
}
shapes = pytest.mark.parametrize("name", SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_what_the_shapes_cover():
    configs = [(case.config, case) for case in SHAPES.values()]
    pixels = [c.output_hw(s.height, s.width) for c, s in configs]
    more = [h * w > c.out_channels for (h, w), (c, _) in zip(pixels, configs, strict=True)]
    assert 3 <= sum(more) <= len(more) - 3
    assert sum(c.residual for c, _ in configs) >= 3
    assert sum(c.residual and few for (c, _), few in zip(configs, more, strict=True)) >= 3
    assert any(c.residual and not few for (c, _), few in zip(configs, more, strict=True))


@cache
def alone(name: str, dtype: torch.dtype) -> tuple[Tensor, object, Tensor]:
    """7 images, weights, and what one thread makes of each image by itself."""
    case = replace(SHAPES[name], batch=7)
    x, weights = case.inputs(dtype)
    # Images whose gates are far apart.
    x = x * torch.linspace(0.3, 2, 7).view(7, 1, 1, 1).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    y = torch.cat([run("cpu", x[i : i + 1], weights, **case.settings) for i in range(7)])
    torch.set_num_threads(threads)
    return x, weights, y


@shapes
@dtypes
def test_against_float64(name, dtype):
    case = SHAPES[name]
    x, weights, y = alone(name, dtype)
    expected = expect(case, x, weights)
    assert (reason := why_wrong(y, expected)) is None, reason
    if dtype != torch.float32 and not multiplies_pairs(case, dtype):
        assert (reason := why_not_rounded_once(y, expected, case, x, weights)) is None, reason


@shapes
@dtypes
def test_the_gate_matters(name, dtype):
    """Gates of the images differ, and from one: otherwise these tests would see no wrong gate."""
    case = SHAPES[name]
    x, weights, y = alone(name, dtype)
    expected = expect(case, x, weights)
    without = replace(weights, gate=None)
    double = without.to(torch.float64)
    ungated = reference.inverted_residual(x.double(), double, **case.settings)
    assert why_wrong(ungated.to(dtype), expected) is not None
    swapped = run("cpu", x.roll(1, 0), weights, **case.settings).roll(-1, 0)
    assert torch.equal(swapped, y)


@shapes
@dtypes
def test_the_same_bits_at_any_threads_and_place(name, dtype, set_threads):
    case = SHAPES[name]
    x, weights, right = alone(name, dtype)
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        for batch in (1, 2, 3, 4, 7):
            for first in {0, 7 - batch}:
                part = slice(first, first + batch)
                y = run("cpu", x[part], weights, **case.settings)
                assert torch.equal(y, right[part]), (threads, part)


@shapes
@dtypes
def test_the_same_bits_again_and_at_any_strides(name, dtype, set_threads):
    case = SHAPES[name]
    x, weights, right = alone(name, dtype)
    padded = torch.full((7, x.shape[1] + 3, x.shape[2] + 2, x.shape[3] + 5), torch.nan)
    padded = padded.to(dtype)
    padded[:, 2:-1, 1:-1, 2:-3] = x
    layouts = (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        padded[:, 2:-1, 1:-1, 2:-3],
    )
    for threads in (1, 3):
        set_threads(threads)
        for image in (x, *layouts) * 2:
            assert torch.equal(run("cpu", image, weights, **case.settings), right)


@shapes
def test_an_image_does_not_touch_another(name, set_threads):
    case = SHAPES[name]
    x, weights, right = alone(name, torch.float32)
    x = x.clone()
    x[3] = torch.nan
    for threads in (1, 2, 3):
        set_threads(threads)
        y = run("cpu", x, weights, **case.settings)
        assert y[3].isnan().all()
        others = [0, 1, 2, 4, 5, 6]
        assert torch.equal(y[others], right[others])
