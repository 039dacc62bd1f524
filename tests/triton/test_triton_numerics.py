"""NaN, infinities, zeros and denormals in the Triton kernel, and what padding may contribute."""

from dataclasses import replace
from functools import partial
from itertools import product
from math import inf, isfinite, nan

import cases
import pytest
import torch
from cases import Case, expect
from special_values import skipping_reference, why_unlike
from triton_cases import DEVICE, HAS_GPU, QUICK, make_inputs, run_config

from mnv2_kernels import FoldedWeights, inverted_residual
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig

pytestmark = pytest.mark.sampled(4)

# The last one is a denormal of float16 and an ordinary number of the others.
SPECIAL = (nan, inf, -inf, -0.0, 1e-40, 6e-8)
KINDS = {
    "float32": (torch.float32, False),
    "float16": (torch.float16, False),
    "half": (torch.float16, True),
    "bfloat16": (torch.bfloat16, False),
}
CASES = [
    Case(BlockConfig(5, 19, 5, residual=True), 5, 4),
    Case(BlockConfig(16, 33, 9, stride=2, padding=(0, 0, 1, 1)), 4, 7),
    Case(BlockConfig(4, 17, 6, kernel_size=5, dilation=2, padding=(8, 4, 0, 3)), 3, 9),
    Case(BlockConfig(18, 24, 8, 2, kernel_size=5, padding=(2,) * 4), 4, 6, clips=(NO_CLIP,) * 3),
    Case(BlockConfig(19, 19, 8, expansion=False), 5, 4, clips=(NO_CLIP, RELU, RELU6)),
]
# A chunk ends within every block's channels.
MANY = replace(QUICK, patches=256, patch_h=2, patch_w=1, chunk=32, in_tile=16, out_tile=16)
FEW = replace(MANY, patches=16)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_kind = pytest.mark.parametrize("dtype, half", KINDS.values(), ids=KINDS)


def channels_of(count: int) -> set[int]:
    """The first and the last channel, and those on both sides of a tile's edge."""
    return {0, min(15, count - 1), min(16, count - 1), count - 1}


@each_kind
@each_case
def test_special_values_at_every_position_of_x(case, dtype, half):
    """Image i of a batch has the value at its i-th pixel; the others must not notice.

    Half of the values for each block.
    """
    x, weights = make_inputs(case, dtype)
    pixels = case.height * case.width
    x = x.expand(pixels, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    clean = expect(case, x, weights)
    config = replace(MANY, half=half)
    channels = sorted({0, case.config.in_channels - 1})
    wrong = {}
    first = CASES.index(case) % 2
    for i, value in list(enumerate(SPECIAL))[first::2]:
        channel = channels[i // 2 % 2]
        injected = x.clone()
        injected.flatten(2)[range(pixels), channel, range(pixels)] = value
        y = run_config(injected, weights, case, config)
        reason = why_unlike(y, skipping_reference(injected, weights, case), clean)
        if reason:
            wrong[f"{value} in channel {channel}"] = reason
    assert not wrong


@each_kind
@each_case
def test_special_values_in_the_weights(case, dtype, half):
    """A third of all pairs of a tensor and a value for each block and dtype, taps elsewhere."""
    x, weights = make_inputs(case, dtype)
    clean = expect(case, x, weights)
    names = ("w_expand", "b_expand", "b_dw", "w_project", "b_project")
    first = (CASES.index(case) + list(KINDS.values()).index((dtype, half))) % 3
    wrong = {}
    for i, (name, value) in list(enumerate(product(names, SPECIAL)))[first::3]:
        tensor = getattr(weights, name)
        if tensor is None:
            continue
        positions = list(product(*(sorted(channels_of(n)) for n in tensor.shape)))
        position = positions[i * 5 % len(positions)]
        injected = tensor.clone()
        injected[position] = value
        changed = replace(weights, **{name: injected})
        y = run_config(x, changed, case, replace(FEW, half=half, keep_x=i % 2 == 0))
        reason = why_unlike(y, skipping_reference(x, changed, case), clean)
        if reason:
            wrong[f"{value} at {position} of {name}"] = reason
    assert not wrong


@each_kind
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.id)
def test_special_values_in_taps(case, dtype, half):
    """Without padding: what that does to them is another test."""
    config = replace(case.config, padding=(0,) * 4, residual=False)
    case = replace(case, config=config, height=9, width=10)
    x, weights = make_inputs(case, dtype)
    clean = expect(case, x, weights)
    kernel, _, hidden = weights.w_dw.shape
    channels = sorted(channels_of(hidden))
    wrong = {}
    for i, position in list(enumerate(product(range(kernel), repeat=2)))[:: kernel - 1]:
        value, channel = SPECIAL[i % len(SPECIAL)], channels[i % len(channels)]
        w_dw = weights.w_dw.clone()
        w_dw[position][channel] = value
        changed = replace(weights, w_dw=w_dw)
        y = run_config(x, changed, case, replace(FEW, half=half))
        reason = why_unlike(y, skipping_reference(x, changed, case), clean)
        if reason:
            wrong[f"{value} at {position} of channel {channel}"] = reason
    assert not wrong


@each_kind
@pytest.mark.parametrize("bias", [3.0, -3.0, 100.0, nan])
def test_padding_is_zero_behind_the_expansion(bias, dtype, half):
    """x is 0, so a kernel that pads x instead has clip(bias) around the expansion, not 0."""
    wrong = {}
    chosen = [case for case in cases.groups()["S2"] if case.height * case.width <= 60][::18]
    assert len(chosen) >= 4
    for i, case in enumerate(chosen):
        case = replace(case, clips=((RELU6, RELU6, NO_CLIP), (NO_CLIP,) * 3)[i % 2])
        x, weights = make_inputs(case, dtype)
        x = torch.zeros_like(x)
        ones = torch.ones_like(weights.b_expand)
        clean = expect(case, x, replace(weights, b_expand=ones * 3))
        if isfinite(bias):
            clean = expect(case, x, replace(weights, b_expand=ones * bias))
        weights = replace(weights, b_expand=ones * bias)
        y = run_config(x, weights, case, replace(FEW, half=half))
        if reason := why_unlike(y, skipping_reference(x, weights, case), clean):
            wrong[case.id] = reason
    assert not wrong


@each_kind
@pytest.mark.parametrize(
    "clips",
    [
        ((1.0, 2.0), (-3.0, -1.0), NO_CLIP),
        ((-3.0, -1.0), (1.0, 2.0), (1.0, 2.0)),
        ((-inf, -0.5), (0.5, inf), (-inf, 0.25)),
        ((-inf, inf), (-inf, inf), (-inf, inf)),
        ((2.0, 2.0), (-1.5, -1.5), NO_CLIP),
        ((inf, inf), (0.0, 6.0), (-2.0, 2.0)),
        ((0.0, 6.0), (-inf, -inf), NO_CLIP),
    ],
    ids=str,
)
def test_clips_that_hold_no_zero(clips, dtype, half):
    """Neither padding nor the hidden channels and pixels that do not exist are clipped."""
    wrong = {}
    for case, keep_x in ((CASES[0], True), (CASES[1], False)):
        x, weights = make_inputs(case, dtype)
        weights = replace(weights, w_dw=weights.w_dw.abs(), w_project=weights.w_project.abs())
        clean = expect(case, x, weights)
        weights = replace(weights, clip_expand=clips[0], clip_dw=clips[1], clip_project=clips[2])
        y = run_config(x, weights, case, replace(FEW, half=half, keep_x=keep_x))
        if reason := why_unlike(y, skipping_reference(x, weights, case), clean):
            wrong[case.id] = reason
    assert not wrong


# The interpreter cannot convert denormals to bfloat16.
CONVERTED = {name: kind for name, kind in KINDS.items() if HAS_GPU or name != "bfloat16"}


@pytest.mark.parametrize("dtype, half", CONVERTED.values(), ids=CONVERTED)
def test_denormals_are_not_flushed(dtype, half):
    channels = 20
    smallest = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}.get(dtype, 2.0**-149)
    identity = torch.eye(channels, dtype=dtype, device=DEVICE)
    w_dw = torch.zeros(3, 3, channels, dtype=dtype, device=DEVICE)
    w_dw[1, 1] = 1
    weights = FoldedWeights(identity, None, w_dw, None, identity, None, RELU6, RELU6)
    case = Case(BlockConfig(channels, channels, channels), 2, 3, biases=(False,) * 3)
    x = torch.arange(1, 1 + channels * 6, device=DEVICE).reshape(1, channels, 2, 3)
    x = (x.double() * smallest).to(dtype)
    run = partial(run_config, case=case, config=replace(FEW, half=half))
    assert x.min() > 0 and torch.equal(run(x, weights), x)
    t1 = replace(weights, w_expand=None, clip_expand=NO_CLIP)
    t1_case = replace(case, config=replace(case.config, expansion=False))
    assert torch.equal(run(x, t1, case=t1_case), x)


@pytest.mark.parametrize("expansion", (True, False))
def test_sums_of_unbounded_values_do_not_overflow(expansion):
    """40000 + 40000 - 80000 is 0, and in fp16 it would be infinite on the way."""
    x = torch.full((1, 8, 1, 3), 40000.0, dtype=torch.float16, device=DEVICE)
    w_dw = torch.zeros(3, 3, 8, dtype=torch.float16, device=DEVICE)
    w_dw[1] = torch.tensor([1.0, 1.0, -2.0], device=DEVICE)[:, None]
    identity = torch.eye(8, dtype=torch.float16, device=DEVICE)
    clips = ((0.0, inf), (-inf, inf), (-inf, inf))
    w_expand = identity if expansion else None
    weights = FoldedWeights(w_expand, None, w_dw, None, identity, None, *clips)
    y = inverted_residual(x, weights, backend="triton")
    expected = torch.tensor([-40000.0, 0.0], device=DEVICE)
    assert torch.equal(y[0, 0, 0, :2].float(), expected)
