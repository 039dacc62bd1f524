"""Blocks that are no module of their own: consecutive children of an nn.Sequential.

MobileNetV1's pair of depthwise and 1x1, torchvision's MnasNet (`layers[3:8]`), ShuffleNet's
branches, the heads of SSDLite: what an nn.Sequential computes is known, so any consecutive children
of it that are the layers of a block, and all of their layers, can run as one. Modules of other
classes that do nothing but run their children in order are listed in CHAINS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from ..block.fold import BlockLayers, ConvNorm
from . import transformers
from .convolutions import is_identity, is_zero_pad
from .declined import Declined
from .layers import append, assemble, check_untouched, flatten, is_sequential

Children = dict[str, nn.Module]


@dataclass(frozen=True)
class Run:
    """The children start:stop of a chain: the layers of one block, or why they are none."""

    start: int
    stop: int
    layers: BlockLayers | None = None
    reason: str | None = None


def _of_sequential(module: nn.Module) -> Children | None:
    return dict(module._modules) if is_sequential(module) else None


# Each gives the children that a module runs one after the other, None for other modules.
CHAINS: tuple[Callable[[nn.Module], Children | None], ...] = (_of_sequential, transformers.chain)


def chain(module: nn.Module) -> Children | None:
    """The children that a module runs in this order, doing nothing else; None for others."""
    return next((found for of in CHAINS if (found := of(module)) is not None), None)


def part(named: Children, start: int, stop: int) -> nn.Sequential:
    """A Sequential of the children start:stop of a chain."""
    kept = nn.Sequential()
    kept._modules.update(list(named.items())[start:stop])
    return kept


def recognize(module: nn.Module) -> BlockLayers | None:
    """The layers of a Sequential that is one block as a whole, without a residual."""
    if not is_sequential(module):
        return None
    run = next(find_runs(module), None)
    if run is None or run.layers is None or run.layers.same_padding:
        return None
    return run.layers if (run.start, run.stop) == (0, len(module)) else None


def find_runs(module: nn.Module) -> Iterator[Run]:
    """The blocks among the children of a chain, from front to back; none for other modules.

    Every depthwise that a 1x1 convolution follows is in a run, fused or declined, or stands with
    that convolution inside one child, which is a chain of its own.
    """
    named = chain(module)
    if named is None:
        return
    flat = [(i, layer) for i, child in enumerate(named.values()) for layer in _flatten(child)]
    convs = [n for n, (_, layer) in enumerate(flat) if _is_convolution(layer)]
    taken = 0
    for before, middle, last in zip([None, *convs], convs, convs[1:], strict=False):
        (first, depthwise), (_, project) = flat[middle], flat[last]
        if first < taken or not (_is_depthwise(depthwise) and _is_pointwise(project, depthwise)):
            continue
        firsts = [first]
        while first > taken and _only_pads(flat, first - 1):
            first -= 1
            firsts.insert(0, first)
        if before is not None and flat[before][0] >= taken and _is_pointwise(flat[before][1]):
            firsts.insert(0, flat[before][0])
        taken = _stop(flat, last)
        if firsts[-1] != taken - 1:
            run = _run(named, firsts, taken)
            if run.layers is None and firsts[-1] == flat[last][0]:
                # Both stand inside one child; only what follows it is no part of a block with it.
                taken = firsts[-1] + 1
            else:
                yield run


def _flatten(child: nn.Module) -> list[nn.Module]:
    try:
        return list(flatten(child))
    except Declined:
        return [child]


# Duck-typed, so that quantised convolutions count.
def _is_convolution(layer: nn.Module) -> bool:
    sizes = all(hasattr(layer, name) for name in ("in_channels", "kernel_size", "groups"))
    return sizes and not getattr(layer, "transposed", False)


def _is_depthwise(conv: nn.Module) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels > 1


def _is_pointwise(conv: nn.Module, before: nn.Module | None = None) -> bool:
    fits = before is None or conv.in_channels == before.out_channels
    return fits and conv.kernel_size == (1, 1) and conv.groups == 1


def _only_pads(flat: list[tuple[int, nn.Module]], child: int) -> bool:
    return all(is_zero_pad(layer) for i, layer in flat if i == child)


def _stop(flat: list[tuple[int, nn.Module]], last: int) -> int:
    """Behind the last child whose layers still belong to the projection, which is flat[last]."""
    here, project = flat[last]
    stage = ConvNorm(project, None)
    for child, layer in flat[last + 1 :]:
        if not is_identity(layer):
            try:
                stage = append(stage, layer)
            except Declined:
                return max(child, here + 1)
    return flat[-1][0] + 1


def _run(named: Children, firsts: list[int], stop: int) -> Run:
    """The run from the first of `firsts` that gives a block; the last of them says why not."""
    for first in firsts:
        inside = part(named, first, stop)
        try:
            layers = assemble(flatten(inside), residual=False)
            check_untouched(inside)
        except Declined as declined:
            reason = str(declined)
        else:
            return Run(first, stop, layers)
    return Run(firsts[-1], stop, reason=reason)
