"""Blocks with curves and squeeze-excite on the Triton backend: values against float64, and bits."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from cases import expect, mean_error, run, why_wrong
from mbconv_blocks import MBConvCase
from torch import Tensor
from triton_cases import CONFIGS, DEVICE, HAS_GPU, each_config, each_dtype
from triton_mbconv import BLOCKS, MANY, ODD, few_pixels, inputs, plan, run_config

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import CURVES, NO_CLIP, RELU, RELU6, SCALES, BlockConfig
from mnv2_kernels.ops import reference
from mnv2_kernels.ops.triton import configs

CASES = list(few_pixels())
SELECTED = {torch.float32: CASES[::3], torch.float16: CASES[1::9], torch.bfloat16: CASES[5::9]}
pytestmark = pytest.mark.sampled(10)
each_block = pytest.mark.parametrize("name", BLOCKS)


def test_what_the_cases_cover():
    chosen = [case for selected in SELECTED.values() for case in selected]
    for name, values in {
        "kernel_size": {3, 5},
        "stride": {1, 2},
        "dilation": {1, 2},
        "expansion": {True, False},
        "residual": {True, False},
        "squeeze_channels": {0, 1, 5},
    }.items():
        assert {getattr(case.config, name) for case in chosen} == values, name
    for place in range(3):
        assert set(CURVES) <= {case.between[place] for case in chosen}, place
    gated = [case for case in chosen if case.config.squeeze_channels]
    assert {case.squeeze for case in gated} == {RELU, RELU6, *CURVES}
    assert {case.scale for case in gated} == set(SCALES)
    assert len({case.config.padding for case in chosen}) >= 5


# The mean error over that of the layers, over all cases: it may only fall.
RATCHET = {
    torch.float32: 1.0,
    torch.float16: 1.0,
    # The interpreter cuts bfloat16 off where a GPU rounds to nearest.
    torch.bfloat16: 1.0 if HAS_GPU else 2.5,
}


@each_dtype
def test_values(dtype):
    wrong, ours, eager = {}, 0.0, 0.0
    for case in SELECTED[dtype]:
        x, weights = inputs(case, dtype)
        expected = expect(case, x, weights)
        y = run("triton", x, weights, **case.settings)
        ours, eager = ours + mean_error(y, expected), eager + expected.eager_mean
        if reason := why_wrong(y, expected):
            wrong[str(case)] = reason
        assert y.is_contiguous(memory_format=torch.channels_last)
    print(f"{dtype}: {ours / eager:.3f} of the layers' mean error")
    assert not wrong
    assert ours / eager < RATCHET[dtype]


@each_config
def test_every_configuration(config):
    wrong = {}
    for name, case in BLOCKS.items():
        x, weights = inputs(case, torch.float32)
        y = run_config(x, weights, case, config)
        if reason := why_wrong(y, expect(case, x, weights)):
            wrong[name] = reason
    assert not wrong


@each_dtype
@each_block
def test_channels_and_pixels_that_no_tile_divides(name, dtype):
    case = BLOCKS[name]
    x, weights = inputs(case, dtype)
    y = run("triton", x, weights, **case.settings)
    assert why_wrong(y, expect(case, x, weights)) is None


def test_many_tiles():
    config = CONFIGS["1x1"]
    launches = plan(MANY, config, torch.float32)
    assert launches.image_tiles > launches.excitation.constants["STEP"]
    assert launches.projection.constants["OUT_TILE"] < MANY.config.out_channels
    x, weights = inputs(MANY, torch.float32)
    y = run_config(x, weights, MANY, config)
    assert why_wrong(y, expect(MANY, x, weights)) is None


def test_the_gate_matters():
    """Without it, or with the gate of another image, the values are others."""
    x, weights = inputs(ODD, torch.float32)
    expected = expect(ODD, x, weights)
    ungated = reference.inverted_residual(x, replace(weights, gate=None), **ODD.settings)
    assert why_wrong(ungated, expected) is not None
    brighter = torch.cat([x[:1], 2 * x[1:]])
    assert torch.equal(*(run("triton", i, weights, **ODD.settings)[:1] for i in (x, brighter)))


@each_dtype
@each_block
def test_places_in_a_batch(name, dtype):
    """An image gives the same bits alone and anywhere in a batch, in tiles of other images."""
    case = replace(BLOCKS[name], batch=1)
    image, weights = inputs(case, dtype)
    alone = run("triton", image, weights, **case.settings)
    x = torch.randn(3, *image.shape[1:], device=DEVICE).to(dtype)
    x[::2] = image
    together = run("triton", x, weights, **case.settings)
    assert all(torch.equal(y, alone[0]) for y in together[::2])
    assert not torch.equal(together[1], alone[0])


@each_block
def test_an_image_with_nan_is_the_only_one(name):
    case = replace(BLOCKS[name], batch=2)
    x, weights = inputs(case, torch.float32)
    clean = run("triton", x, weights, **case.settings)
    for value in (inf, -inf, nan):
        x[1, 3, 2, 1] = value
        y = run("triton", x, weights, **case.settings)
        assert torch.equal(y[0], clean[0])
    # The gate of an image with NaN is NaN, and with it all of its result.
    assert y[1].isnan().all() if weights.gate else y[1].isnan().any()


def through(curve: str, x: Tensor, place: str) -> Tensor:
    """curve(x) of numbers (count,), by a block that does nothing else."""
    channels = 16
    eye, taps = torch.eye(channels), torch.zeros(3, 3, channels)
    taps[1, 1] = 1
    after = dict.fromkeys(("clip_expand", "clip_dw", "clip_project"), NO_CLIP) | {place: curve}
    weights = FoldedWeights(eye, None, taps, None, eye, None, **after).to(DEVICE)
    images = x.to(DEVICE).view(1, 1, -1, channels).permute(0, 3, 1, 2)
    case = MBConvCase(BlockConfig(channels, channels, channels), 1, images.shape[3])
    y = run("triton", images, weights, **case.settings)
    return y.permute(0, 2, 3, 1).flatten().cpu()


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("place", ["clip_expand", "clip_dw", "clip_project"])
def test_curves(curve, place):
    """As near to float64 as PyTorch's own curve, at numbers of every size."""
    sizes = 10 ** torch.linspace(-30, 30, 31, dtype=torch.float64)
    x = torch.cat([torch.linspace(-20, 20, 450), sizes.float(), -sizes.float()])
    y, eager = through(curve, x, place), reference.activate(x, curve)
    truth = reference.activate(x.double(), curve)
    # Of x**3 and erf, PyTorch's float64 makes NaN and differences of nearly equal numbers.
    truth = truth.where(x > -100, 0.0)
    error, allowed = (y - truth).abs(), (eager - truth).abs().nan_to_num(0)
    assert (error <= 2 * allowed + 1e-6 * truth.abs() + 1e-7 * x.abs() * (x.abs() < 100)).all()


SPECIAL = {
    nan: dict.fromkeys(CURVES, nan),
    inf: dict.fromkeys(CURVES, inf),
    -inf: dict.fromkeys(CURVES, 0.0) | {"hardswish": nan},
    -3e38: dict.fromkeys(CURVES, 0.0),
    3e38: dict.fromkeys(CURVES, 3e38),
}


@pytest.mark.parametrize("curve", CURVES)
def test_special_values_of_curves(curve):
    """One number of one channel: NaN times 0 is NaN, in other channels and pixels too."""
    one = torch.ones(3, 3, 1, device=DEVICE)
    weights = FoldedWeights(None, None, one, None, one[0, :1], None, NO_CLIP, NO_CLIP, curve)
    case = MBConvCase(BlockConfig(1, 1, 1, expansion=False), 1, 1)
    for value, right in SPECIAL.items():
        x = torch.full((1, 1, 1, 1), value, device=DEVICE)
        y = run("triton", x, weights, **case.settings).cpu().flatten()[0]
        truth = torch.tensor(right[curve])
        assert torch.isclose(y, truth, rtol=1e-6, atol=0, equal_nan=True), (value, y)


@pytest.mark.parametrize("scale", SCALES)
def test_gates_far_from_zero(scale):
    """All or nothing of a channel, and no NaN, where the excitation is huge."""
    case = replace(ODD, scale=scale, batch=1)
    x, weights = inputs(case, torch.float32)
    plain = replace(weights, gate=None)
    for bias, share in ((1e6, 1), (inf, 1), (-1e6, 0), (-inf, 0)):
        gate = replace(weights.gate, b_excite=torch.full((37,), bias, device=DEVICE))
        y = run("triton", x, replace(weights, gate=gate), **case.settings)
        weight = plain.w_project * share
        expected = expect(case, x, replace(plain, w_project=weight))
        assert why_wrong(y, expected) is None, bias


def test_the_depthwise_is_not_computed_in_half():
    """Curves have no bounds: 40000 + 40000 - 80000 is 0, and infinite on the way in fp16."""
    block = BlockConfig(8, 8, 8)
    assert configs.fallback(block, torch.float16).config.half
    assert not configs.of_sums(block, torch.float16, DEVICE).half
    x = torch.full((1, 8, 1, 3), 40000.0, dtype=torch.float16, device=DEVICE)
    w_dw = torch.zeros(3, 3, 8, dtype=torch.float16, device=DEVICE)
    w_dw[1] = torch.tensor([1.0, 1.0, -2.0], device=DEVICE)[:, None]
    identity = torch.eye(8, dtype=torch.float16, device=DEVICE)
    weights = FoldedWeights(identity, None, w_dw, None, identity, None, (0.0, 5e4), "hardswish")
    y = run("triton", x, weights, **MBConvCase(block, 1, 3).settings)
    # The first output is 40000 - 80000 below the curve, the second 0.
    assert not y[0, 0, 0, :2].any()
