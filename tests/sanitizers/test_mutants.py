"""Wrong blocks must fail the comparison that the tests of values use.

Each mutant is the block with one step replaced; on every case that it can differ on, it must be
found, also where the result is wrong in a few elements only.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Case, expect, make_inputs, why_wrong
from rounding import multiplies_pairs, why_not_rounded_once
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig

CASES = [
    Case(BlockConfig(24, 144, 24, residual=True), 14, 11, batch=2),
    Case(BlockConfig(17, 70, 33, stride=2, padding=(0, 0, 1, 1)), 10, 12, batch=3),
    Case(BlockConfig(16, 48, 24, stride=2, kernel_size=5, padding=(2,) * 4), 9, 16, batch=2),
    Case(BlockConfig(24, 96, 24, kernel_size=5, padding=(2,) * 4, residual=True), 7, 9, batch=2),
    Case(
        BlockConfig(16, 64, 16, dilation=2, padding=(2,) * 4, residual=True),
        8,
        8,
        batch=2,
        clips=(RELU6, RELU6, RELU6),
    ),
]


def keep(h: Tensor) -> Tensor:
    return h


def block(
    x: Tensor,
    weights: FoldedWeights,
    case: Case,
    *,
    pad: Callable[[Tensor, tuple], Tensor] = F.pad,
    pad_input: Callable[[Tensor, tuple], Tensor] | None = None,
    hidden: Callable[[Tensor], Tensor] = keep,
    depthwise: Callable[[Tensor], Tensor] = keep,
    project: Callable[[Tensor], Tensor] = keep,
    result: Callable[[Tensor, Tensor], Tensor] = lambda y, x: y,
) -> Tensor:
    """The block from PyTorch's functions, with a hook after each of its steps."""
    config = case.config
    top, left, bottom, right = config.padding
    sides = (left, right, top, bottom)
    h = x if pad_input is None else pad_input(x, sides)
    h = F.conv2d(h, weights.w_expand.t()[:, :, None, None], weights.b_expand)
    h = hidden(h.clip(*weights.clip_expand))
    h = pad(h, sides) if pad_input is None else h
    taps = weights.w_dw.permute(2, 0, 1)[:, None]
    h = F.conv2d(h, taps, weights.b_dw, config.stride, 0, config.dilation, len(taps))
    h = depthwise(h.clip(*weights.clip_dw))
    y = F.conv2d(h, weights.w_project.t()[:, :, None, None], weights.b_project)
    y = project(y.clip(*weights.clip_project))
    return result(y + x if config.residual else y, x)


def with_weights(x: Tensor, weights: FoldedWeights, case: Case, **changes) -> Tensor:
    """The block on weights of which some are replaced by functions of themselves."""
    changed = {name: change(getattr(weights, name)) for name, change in changes.items()}
    return block(x, replace(weights, **changed), case)


def with_config(x: Tensor, weights: FoldedWeights, case: Case, change) -> Tensor:
    return block(x, weights, replace(case, config=change(case.config)))


def without(dim: int, index: int) -> Callable[..., Tensor]:
    """A step that leaves zeros in one row, column, channel or image."""

    def zeroed(h: Tensor, *_) -> Tensor:
        h = h.clone()
        h.select(dim, index).zero_()
        return h

    return zeroed


def repeated(dim: int, index: int) -> Callable[..., Tensor]:
    """A step that repeats the slice before in place of this one."""

    def copied(h: Tensor, *_) -> Tensor:
        h = h.clone()
        h.select(dim, index).copy_(h.select(dim, index - 1))
        return h

    return copied


def rounded(h: Tensor, dtype: torch.dtype) -> Tensor:
    return h.to(dtype).to(h.dtype)


def shifted_stride(h: Tensor, sides: tuple) -> Tensor:
    """One column and row further: the other phase of a stride of 2."""
    left, right, top, bottom = sides
    return F.pad(h, (left - 1, right + 1, top - 1, bottom + 1))


def swapped_sides(h: Tensor, sides: tuple) -> Tensor:
    left, right, top, bottom = sides
    return F.pad(h, (right, left, bottom, top))


def wrapped_rows(h: Tensor, sides: tuple) -> Tensor:
    """The right padding holds the next row: a kernel that forgets where a row ends."""
    left, right, top, bottom = sides
    wide = F.pad(h, (left, 0, top, bottom))
    following = F.pad(h[..., :right], (0, 0, top, bottom)).roll(-1, 2)
    return torch.cat([wide, following], 3)


def edge_rows(h: Tensor, sides: tuple) -> Tensor:
    return F.pad(h, sides, mode="replicate")


upper_only, lower_only = (lambda clip: (-float("inf"), clip[1])), (lambda clip: (clip[0], 1e30))
drop = torch.zeros_like
MUTANTS: dict[str, Callable[[Tensor, FoldedWeights, Case], Tensor]] = {
    "zeros": partial(block, result=lambda y, x: torch.zeros_like(y)),
    "no lower clip after expansion": partial(with_weights, clip_expand=upper_only),
    "no upper clip after expansion": partial(with_weights, clip_expand=lower_only),
    "no lower clip after depthwise": partial(with_weights, clip_dw=upper_only),
    "no upper clip after depthwise": partial(with_weights, clip_dw=lower_only),
    "padded x instead of the expansion": partial(block, pad_input=F.pad),
    "padding repeats the border": partial(block, pad=edge_rows),
    "right padding is the next row": partial(block, pad=wrapped_rows),
    "stride phase shifted": partial(block, pad=shifted_stride),
    "depthwise taps flipped": partial(with_weights, w_dw=lambda w: w.flip(0, 1)),
    "depthwise taps transposed": partial(with_weights, w_dw=lambda w: w.transpose(0, 1)),
    "no bias of the expansion": partial(with_weights, b_expand=drop),
    "no bias of the depthwise": partial(with_weights, b_dw=drop),
    "no bias of the projection": partial(with_weights, b_project=drop),
    "last hidden channel dropped": partial(block, depthwise=without(1, -1)),
    "one hidden channel twice": partial(block, hidden=repeated(1, -1)),
    "last input channel dropped": partial(with_weights, w_expand=without(0, -1)),
    "last output channel left at zero": partial(block, result=without(1, -1)),
    "last row left at zero": partial(block, result=without(2, -1)),
    "last column left at zero": partial(block, result=without(3, -1)),
    "last hidden row missing": partial(block, hidden=without(2, -1)),
    "last hidden column missing": partial(block, hidden=without(3, -1)),
    "first hidden row missing": partial(block, hidden=without(2, 0)),
    "a row repeated": partial(block, result=repeated(2, 4)),
    "a column repeated": partial(block, result=repeated(3, 3)),
    "image 0 everywhere": partial(block, result=lambda y, x: y[:1].expand_as(y)),
    "last image is the one before": partial(block, result=repeated(0, -1)),
    "bfloat16 hidden": partial(block, hidden=partial(rounded, dtype=torch.bfloat16)),
    "float16 hidden": partial(block, hidden=partial(rounded, dtype=torch.float16)),
    "float16 before projection": partial(block, depthwise=partial(rounded, dtype=torch.float16)),
    "one element off by a thousandth": partial(
        block, result=lambda y, x: y.index_put([torch.tensor(0)] * 4, y[0, 0, 0, 0] * 1.001)
    ),
    "last row without last hidden channel": partial(
        block, depthwise=lambda h: torch.cat([h[:, :, :-1], without(1, -1)(h[:, :, -1:])], 2)
    ),
}
RESIDUAL_MUTANTS = {
    "no residual": partial(with_config, change=lambda c: replace(c, residual=False)),
    "residual twice": partial(block, result=lambda y, x: y + x),
    "residual of another image": partial(block, result=lambda y, x: y - x + x.roll(1, 0)),
    "residual transposed": lambda x, w, c: (
        with_config(x, w, c, lambda config: replace(config, residual=False)) + x.flip(3)
    ),
}
CLIPPED_PROJECTION_MUTANTS = {
    "no clip after projection": partial(with_weights, clip_project=lambda clip: NO_CLIP),
    "clip after the residual": lambda x, w, c: with_weights(
        x, w, c, clip_project=lambda clip: NO_CLIP
    ).clip(*RELU6),
}
UNEVEN_PADDING_MUTANTS = {"sides of the padding swapped": partial(block, pad=swapped_sides)}


def survivors(mutants: dict, members: list[Case]) -> list[str]:
    alive = []
    for case in members:
        x, weights = make_inputs(case)
        expected = expect(case, x, weights)
        assert why_wrong(block(x, weights, case), expected) is None, "the block itself is right"
        for name, mutant in mutants.items():
            if why_wrong(mutant(x, weights, case), expected) is None:
                alive.append(f"{name} on {case.id}")
    return alive


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_mutant_is_found(case):
    assert len(MUTANTS) >= 20
    assert not survivors(MUTANTS, [case])


def test_mutants_of_options_are_found():
    residual = [case for case in CASES if case.config.residual]
    clipped = [case for case in CASES if case.clips[2] != NO_CLIP]
    uneven = [case for case in CASES if case.config.padding[:2] != case.config.padding[2:]]
    assert residual and clipped and uneven
    assert not survivors(RESIDUAL_MUTANTS, residual)
    assert not survivors(CLIPPED_PROJECTION_MUTANTS, clipped)
    assert not survivors(UNEVEN_PADDING_MUTANTS, uneven)


def test_mutants_are_found_on_the_real_blocks():
    """Those that differ on every block: of one image, also where no tap is over right padding."""
    elsewhere = ("image 0", "last image", "a row", "a column", "one element", "right padding")
    mutants = {name: m for name, m in MUTANTS.items() if not name.startswith(elsewhere)}
    expanding = [case for case in cases.groups()["S1-width1"] if case.config.expansion]
    assert not survivors(mutants, expanding)


def narrow_block(
    x: Tensor,
    weights: FoldedWeights,
    case: Case,
    *,
    expanded: Callable[[Tensor], Tensor] = keep,
    depthwise: Callable[[Tensor], Tensor] = keep,
    project: Callable[[Tensor], Tensor] = keep,
    result: Callable[[Tensor, Tensor], Tensor] = lambda y, x: y,
    store: Callable[[Tensor, torch.dtype], Tensor] = lambda y, dtype: y.to(dtype),
) -> Tensor:
    """What the CPU kernels compute in 16 bits, in float64, with a hook at each step."""
    in_pairs = multiplies_pairs(case, x.dtype)

    def between(h: Tensor) -> Tensor:
        return depthwise(rounded(h, torch.bfloat16) if in_pairs else h)

    hooks = {"hidden": expanded, "depthwise": between, "project": project, "result": result}
    return store(block(x.double(), weights.to(torch.float64), case, **hooks), x.dtype)


def truncated(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Bits cut off: what a bfloat16 is without rounding."""
    wide = y.to(dtype).to(y.dtype)
    step = torch.nextafter(y.to(dtype), torch.zeros((), dtype=dtype)).to(y.dtype)
    return torch.where(wide.abs() > y.abs(), step, wide).to(dtype)


def swapped_pairs(h: Tensor) -> Tensor:
    """Two neighbouring channels exchanged, of the last pair alone."""
    return torch.cat([h[:, :-2], h[:, -1:], h[:, -2:-1]], 1)


def narrow_mutants(dtype: torch.dtype) -> dict[str, Callable]:
    once = partial(rounded, dtype=dtype)
    return {
        "expanded values rounded": partial(narrow_block, expanded=once),
        "sums rounded ahead of the residual": partial(narrow_block, project=once),
        "cut off, not rounded": partial(narrow_block, store=truncated),
        "low and high of the last pair exchanged": partial(narrow_block, depthwise=swapped_pairs),
        "last hidden channel dropped": partial(narrow_block, depthwise=without(1, -1)),
        "one column from the row before": partial(narrow_block, result=repeated(3, 3)),
        "no residual": partial(narrow_block, result=lambda y, x: y - x),
        "clip behind the residual": partial(
            narrow_block, result=lambda y, x: (y - x + x).clip(*RELU6)
        ),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_channels", [24, 23])
def test_mutants_in_16_bits_are_found(kernel_backend, dtype, in_channels):
    """By the comparison for one rounding, of numbers in pairs and converted."""
    config = BlockConfig(in_channels, 144, in_channels, residual=True)
    case = Case(config, 14, 11, batch=2)
    x, weights = make_inputs(case, dtype)
    expected = expect(case, x, weights)
    right = narrow_block(x, weights, case)
    assert why_not_rounded_once(right, expected, case, x, weights) is None
    mutants = narrow_mutants(dtype)
    alive = [
        name
        for name, mutant in mutants.items()
        if why_not_rounded_once(mutant(x, weights, case), expected, case, x, weights) is None
    ]
    assert not alive
