"""Wrong blocks with a squeeze-excite must fail the comparison that the tests of values use.

As test_mutants.py, of what is about gates and curves; and the gate multiplied in another order, or
means summed up in one, must pass.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import expect, why_wrong
from mbconv_blocks import MBConvCase
from torch import Tensor
from torch.nn import functional as F

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP, RELU, BlockConfig
from mnv2_kernels.ops.reference import activate

SIDES = {"padding": (1, 1, 1, 1)}
CASES = [
    MBConvCase(
        BlockConfig(24, 144, 24, residual=True, squeeze_channels=12), 14, 11, squeeze="silu",
        between=("silu", "silu", NO_CLIP), scale="sigmoid",
    ),
    MBConvCase(BlockConfig(17, 70, 33, stride=2, squeeze_channels=9, padding=(0, 0, 1, 1)), 10, 12),
    MBConvCase(
        BlockConfig(16, 96, 200, kernel_size=5, padding=(2,) * 4, squeeze_channels=24), 7, 7, 3
    ),
    MBConvCase(
        BlockConfig(32, 32, 16, expansion=False, squeeze_channels=8), 20, 18,
        between=(NO_CLIP, "hardswish", NO_CLIP),
    ),
]  # fmt: skip
SCALING = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}


def keep(h: Tensor) -> Tensor:
    return h


def means(h: Tensor) -> Tensor:
    return h.mean((2, 3))


def block(
    x: Tensor,
    weights: FoldedWeights,
    case: MBConvCase,
    *,
    mean: Callable[[Tensor], Tensor] = means,
    squeezed: Callable[[Tensor], Tensor] = keep,
    gate: Callable[[Tensor], Tensor] = keep,
    curve: Callable[[Tensor, object], Tensor] = activate,
    scale: Callable[[Tensor], Tensor] | None = None,
    gate_before_activation: bool = False,
    gate_after_projection: bool = False,
) -> Tensor:
    """The block from PyTorch's functions, with a hook at each step of the gate."""
    config, own = case.config, weights.gate
    top, left, bottom, right = config.padding
    h = x
    if config.expansion:
        h = F.conv2d(h, weights.w_expand.t()[:, :, None, None], weights.b_expand)
        h = curve(h, weights.clip_expand)
    taps = weights.w_dw.permute(2, 0, 1)[:, None]
    h = F.pad(h, (left, right, top, bottom))
    summed = F.conv2d(h, taps, weights.b_dw, config.stride, 0, config.dilation, len(taps))
    h = curve(summed, weights.clip_dw)
    q = squeezed(activate(F.linear(mean(h), own.w_squeeze.t(), own.b_squeeze), own.squeeze))
    g = (scale or SCALING[own.scale])(F.linear(q, own.w_excite.t(), own.b_excite))
    g = gate(g)[:, :, None, None]
    if gate_before_activation:
        h, g = curve(summed * g, weights.clip_dw), torch.ones_like(g)
    project = weights.w_project.t()[:, :, None, None]
    if gate_after_projection:
        y = F.conv2d(h, project, weights.b_project) * g.mean(1, keepdim=True)
    else:
        y = F.conv2d(h * g, project, weights.b_project)
    y = curve(y, weights.clip_project)
    return y + x if config.residual else y


def padded_means(h: Tensor) -> Tensor:
    """Pixels of the padding are counted, as zeros."""
    return h.sum((2, 3)) / ((h.shape[2] + 2) * (h.shape[3] + 2))


def means_of_rows(h: Tensor, begin: int, end: int | None) -> Tensor:
    return h[:, :, begin:end].sum((2, 3)) / (h.shape[2] * h.shape[3])


def without_activation(x: Tensor, weights: FoldedWeights, case: MBConvCase) -> Tensor:
    return block(x, replace(weights, gate=replace(weights.gate, squeeze=NO_CLIP)), case)


def with_gate(name: str, change: Callable) -> Callable:
    def run(x: Tensor, weights: FoldedWeights, case: MBConvCase) -> Tensor:
        gate = replace(weights.gate, **{name: change(getattr(weights.gate, name))})
        return block(x, replace(weights, gate=gate), case)

    return run


def other_scale(name: str) -> str:
    return "sigmoid" if name == "hardsigmoid" else "hardsigmoid"


def three_terms(h: Tensor, activation) -> Tensor:
    """exp(-|x|) of SiLU by a polynomial of three terms around the nearest power of 2."""
    if activation not in ("silu", "hardswish"):
        return activate(h, activation)
    if activation == "hardswish":
        return F.silu(h)
    u = h.double() * -1.4426950408889634
    f = u - u.floor()
    power = (1 + f * (0.6565 + 0.3435 * f)) * torch.exp2(u.floor())
    return (h / (1 + power)).to(h.dtype)


def wrong_curve(h: Tensor, activation) -> Tensor:
    swapped = {"silu": "hardswish", "hardswish": "silu"}
    if isinstance(activation, str):
        return activate(h, swapped[activation])
    return activate(h, activation)


MUTANTS: dict[str, Callable[[Tensor, FoldedWeights, MBConvCase], Tensor]] = {
    "gate of the next vector": partial(block, gate=lambda g: g.roll(16, 1)),
    "gate of the chunk before": partial(block, gate=lambda g: g.roll(-16, 1)),
    "gate of the next channel": partial(block, gate=lambda g: g.roll(1, 1)),
    "gate of another image": partial(block, gate=lambda g: g.roll(1, 0)),
    "gate of the first image": partial(block, gate=lambda g: g[:1].expand_as(g)),
    "gate of the last channel left out": partial(
        block, gate=lambda g: torch.cat([g[:, :-1], torch.ones_like(g[:, -1:])], 1)
    ),
    "no gate": partial(block, gate=torch.ones_like),
    "gate twice": partial(block, gate=torch.square),
    "gate in bfloat16": partial(block, gate=lambda g: g.bfloat16().to(g.dtype)),
    "gate before the activation": partial(block, gate_before_activation=True),
    "gate after the projection": partial(block, gate_after_projection=True),
    "mean over the padded image": partial(block, mean=padded_means),
    "means of the first band": partial(block, mean=partial(means_of_rows, begin=0, end=2)),
    "means without the last row": partial(block, mean=partial(means_of_rows, begin=0, end=-1)),
    "means without the first pixel": partial(
        block, mean=lambda h: means(h) - h[:, :, 0, 0] / (h.shape[2] * h.shape[3])
    ),
    "sums for means": partial(block, mean=lambda h: h.sum((2, 3))),
    "squeeze activation left out": without_activation,
    "largest squeezed unit left out": partial(
        block, squeezed=lambda q: q.where(q.abs() < q.abs().max(1, keepdim=True)[0], 0)
    ),
    "no bias of the squeeze": with_gate("b_squeeze", torch.zeros_like),
    "no bias of the excitation": with_gate("b_excite", torch.zeros_like),
    "the other sigmoid": with_gate("scale", other_scale),
    "SiLU of three terms": partial(block, curve=three_terms),
    "another curve": partial(block, curve=wrong_curve),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.config.name)
def test_every_mutant_is_found(case):
    x, weights = case.inputs()
    # Both gates act: their numbers are far apart, and so are those of the images.
    gate = weights.gate
    weights = replace(
        weights, gate=replace(gate, b_excite=gate.b_excite + torch.randn(len(gate.b_excite)))
    )
    x = x * torch.linspace(0.5, 1.5, len(x))[:, None, None, None]
    expected = expect(case, x, weights)
    assert why_wrong(block(x, weights, case), expected) is None
    alive = [n for n, m in MUTANTS.items() if why_wrong(m(x, weights, case), expected) is None]
    # Where what is squeezed is above zero anyway, its ReLU is not missed.
    if weights.gate.squeeze == RELU and (squeezed_before(x, weights, case) >= 0).all():
        alive.remove("squeeze activation left out")
    assert not alive


def squeezed_before(x: Tensor, weights: FoldedWeights, case: MBConvCase) -> Tensor:
    found = []
    gate = replace(weights.gate, squeeze=NO_CLIP)
    block(x, replace(weights, gate=gate), case, squeezed=lambda q: found.append(q) or q)
    return found[0]


RIGHT = {
    "pixels one after the other": partial(
        block, mean=lambda h: h.flatten(2).cumsum(2)[:, :, -1] / h[0, 0].numel()
    ),
    "pixels backwards": partial(block, mean=lambda h: means(h.flip(2, 3))),
    "weights times the gate": lambda x, weights, case: torch.cat(
        [scaled_weights(x[i : i + 1], weights, case) for i in range(len(x))]
    ),
}


def scaled_weights(x: Tensor, weights: FoldedWeights, case: MBConvCase) -> Tensor:
    found = []
    block(x, weights, case, gate=lambda g: found.append(g) or g)
    project = weights.w_project * found[0][0][:, None]
    return block(x, replace(weights, w_project=project), case, gate=torch.ones_like)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.config.name)
def test_another_order_of_the_same_passes(case):
    x, weights = case.inputs()
    expected = expect(case, x, weights)
    for name, right in RIGHT.items():
        assert why_wrong(right(x, weights, case), expected) is None, name
