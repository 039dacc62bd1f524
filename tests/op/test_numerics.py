"""NaN, infinities, zeros and denormals in every tensor, and what padding may contribute."""

from dataclasses import replace
from itertools import product
from math import inf, isfinite, nan

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Case, expect, make_inputs, run
from special_values import skipping_reference, why_unlike

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig

pytestmark = pytest.mark.sampled(2)


def special(dtype: torch.dtype) -> tuple[float, ...]:
    return nan, inf, -inf, -0.0, torch.finfo(dtype).smallest_normal / 4


CASES = [
    Case(BlockConfig(5, 19, 5, residual=True), 7, 6),
    Case(BlockConfig(16, 33, 9, stride=2, padding=(0, 0, 1, 1)), 6, 9),
    Case(BlockConfig(4, 17, 6, kernel_size=5, dilation=2, padding=(8, 4, 0, 3)), 5, 9),
    Case(BlockConfig(8, 24, 8, 2, kernel_size=5, padding=(2,) * 4), 8, 8, clips=(NO_CLIP,) * 3),
    Case(BlockConfig(19, 19, 8, expansion=False), 5, 6, clips=(NO_CLIP, RELU, RELU6)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@each_case
def test_the_skipping_reference_is_the_reference(case):
    x, weights = make_inputs(case)
    torch.testing.assert_close(skipping_reference(x, weights, case), expect(case, x, weights).truth)


@each_case
def test_special_values_at_every_position_of_x(backend, tested_dtype, case):
    """Image i of a batch has the value at its i-th pixel; the others must not notice."""
    x, weights = make_inputs(case, tested_dtype)
    pixels = case.height * case.width
    x = x.expand(pixels, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    clean = expect(case, x, weights)
    channels = case.config.in_channels
    wrong = {}
    for value, channel in product(special(tested_dtype), {0, channels // 2, channels - 1}):
        injected = x.clone()
        injected.flatten(2)[range(pixels), channel, range(pixels)] = value
        y = run(backend, injected, weights, **case.settings)
        reason = why_unlike(y, skipping_reference(injected, weights, case), clean)
        if reason:
            wrong[f"{value} in channel {channel}"] = reason
    assert not wrong


@pytest.mark.parametrize("name", ["w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project"])
@each_case
def test_special_values_in_the_weights(backend, tested_dtype, case, name):
    x, weights = make_inputs(case, tested_dtype)
    tensor = getattr(weights, name)
    if tensor is None:
        return
    # PyTorch multiplies its padding by the weights.
    values = special(tested_dtype)
    if (backend, name) == ("reference", "w_dw"):
        values = [v for v in values if isfinite(v)]
    clean = expect(case, x, weights)
    positions = product(*({0, n // 2, n - 1} for n in tensor.shape))
    wrong = {}
    for value, position in product(values, list(positions)):
        injected = tensor.clone()
        injected[position] = value
        changed = replace(weights, **{name: injected})
        y = run(backend, x, changed, **case.settings)
        reason = why_unlike(y, skipping_reference(x, changed, case), clean)
        if reason:
            wrong[f"{value} at {position}"] = reason
    assert not wrong


@pytest.mark.parametrize("bias", [3.0, -3.0, 100.0, nan])
def test_padding_is_zero_behind_the_expansion(backend, tested_dtype, bias):
    """x is 0, so a kernel that pads x instead has clip(bias) around the expansion, not 0."""
    wrong = {}
    for case in cases.groups()["S2"][::5]:
        for clips in ((RELU6, RELU6, NO_CLIP), (NO_CLIP, NO_CLIP, NO_CLIP)):
            case = replace(case, clips=clips)
            x, weights = make_inputs(case, tested_dtype)
            x = torch.zeros_like(x)
            clean = expect(case, x, replace(weights, b_expand=torch.full_like(weights.b_expand, 3)))
            weights = replace(weights, b_expand=torch.full_like(weights.b_expand, bias))
            y = run(backend, x, weights, **case.settings)
            if reason := why_unlike(y, skipping_reference(x, weights, case), clean):
                wrong[case.id] = reason
    assert not wrong


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel, dilation", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_weights_over_padding_do_not_count(
    kernel_backend, tested_dtype, value, stride, kernel, dilation
):
    """One pixel: every tap but one is over padding, and all those are NaN or infinite."""
    extent = dilation * (kernel - 1)
    for before in range(0, extent + 1):
        padding = (before, extent - before, extent - before, before)
        config = BlockConfig(6, 20, 6, stride, True, kernel, dilation, padding)
        case = Case(config, 1, 1)
        x, weights = make_inputs(case, tested_dtype)
        inside = [divmod(p, dilation) for p in padding[:2]]
        w_dw = torch.full_like(weights.w_dw, value)
        if all(remainder == 0 for _, remainder in inside):
            (row, _), (column, _) = inside
            w_dw[row, column] = weights.w_dw[row, column]
        weights = replace(weights, w_dw=w_dw)
        truth = skipping_reference(x, weights, case)
        assert truth.isfinite().all()
        y = run(kernel_backend, x, weights, **case.settings)
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        if tested_dtype != torch.float32:
            eps = torch.finfo(tested_dtype).eps
            tolerance = {"rtol": eps, "atol": eps * truth.abs().max().item()}
        torch.testing.assert_close(
            y.double(), truth, **tolerance, msg=lambda m, c=case: f"{c.id}: {m}"
        )


@pytest.mark.parametrize("expansion", [True, False])
def test_denormals_are_not_flushed(backend, expansion):
    channels = 24
    identity = torch.eye(channels)
    w_dw = F.pad(torch.ones(1, 1, channels), (0, 0, 1, 1, 1, 1))
    first, clip = (identity, RELU6) if expansion else (None, NO_CLIP)
    weights = FoldedWeights(first, None, w_dw, None, identity, None, clip, RELU6)
    x = torch.arange(1.0, 1 + channels * 30).reshape(1, channels, 5, 6) * 1e-42
    assert torch.equal(run(backend, x, weights), x)
    small, large = 2.0**-70, 2.0**100
    weights = replace(weights, w_dw=w_dw * small, w_project=identity * large)
    x = torch.full((1, channels, 3, 3), small)
    assert (run(backend, x, weights) == small * small * large).all()
