"""Where the blocks of a model are: what `fuse` replaces and what `explain` tells of."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..block.fold import BlockLayers
from ..modules.fused_module import FusedInvertedResidual, FusedModule
from ..recognizers import (
    Declined,
    Reading,
    block_of,
    follow,
    guess_channels,
    has_depthwise,
    is_image_weight,
    may_have_block,
    read_unknown,
    same_layers,
    spans_of,
)
from ..recognizers.assemble import Span
from ..recognizers.checks import overrides_call
from .sequential import FusedChain, FusedInOrder, FusedRun, FusedSequential, FusedSequentialBlock

# A module with more convolutions is a part of a network, and no block that was declined: a block
# has expansion, depthwise, projection, and up to three more for its shortcut or squeeze-excite.
_MOST_CONVOLUTIONS = 6


@dataclass(frozen=True)
class Found:
    """One block of a model: fused already, one that can be (`reading`), or declined (`reason`).

    `module` is the block itself; with `span`, its children start:stop are the block. `first` names
    the module that gets the block's input.
    """

    name: str
    first: str
    module: nn.Module
    span: tuple[int, int] | None = None
    fused: FusedModule | None = None
    reading: Reading | None = None
    reason: str | None = None

    def make(self) -> FusedInvertedResidual:
        """The block that can be fused, fused."""
        if self.span is not None:
            original = _sequential(self.module, self.span)
            original.training = self.module.training
            return FusedInvertedResidual(original, self.reading)
        if isinstance(self.module, nn.Sequential):
            return FusedSequentialBlock(self.module, self.reading)
        return FusedInvertedResidual(self.module, self.reading)


def find(model: nn.Module) -> Iterator[Found]:
    """The blocks of a model in the order of its modules; a shared one once, none inside another.

    The modules must be in evaluation mode.
    """
    return _find("", model, set())


def fused_chain(original: nn.Module, runs: list[FusedRun]) -> FusedChain:
    """Wrap a chain so that these runs of its children execute as fused blocks."""
    if isinstance(original, nn.Sequential):
        return FusedSequential(original, runs)
    return FusedInOrder(original, list(_children(original)), runs)


def _find(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[Found]:
    # Nothing inside a scripted module can be read or replaced.
    if module in seen or isinstance(module, torch.jit.ScriptModule):
        return
    seen.add(module)
    if isinstance(module, FusedModule):
        yield Found(name, name, module, fused=module)
        return
    if not may_have_block(module):
        return
    if isinstance(module, FusedChain):
        for run in module.runs:
            yield _run(name, module, (run.start, run.stop), fused=run.block)
            seen.update(run.block.original.children())
        yield from _inside(name, module, seen)
        return
    reading, reason = None, None
    if type(module).forward is not nn.Module.forward:
        try:
            reading = read_unknown(module)
            block_of(reading)
            yield Found(name, name, module, reading=reading)
            return
        except Declined as declined:
            reason = str(declined)
    runs = list(_runs(module, reading))
    for span, found in runs:
        yield _run(name, module, span, reading=found)
        seen.update(list(_children(module).values())[slice(*span)])
    inside = list(_inside(name, module, seen))
    if reason is not None and not runs and _is_declined_block(module, inside):
        yield Found(name, name, module, reason=reason)
    else:
        yield from inside


def _inside(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[Found]:
    for child_name, child in module.named_children():
        yield from _find(f"{name}.{child_name}" if name else child_name, child, seen)


def _run(name: str, module: nn.Module, span: tuple[int, int], **found) -> Found:
    first = list(_children(module))[span[0]]
    full = f"{name}.{first}" if name else first
    return Found(f"{name}[{span[0]}:{span[1]}]", full, module, span, **found)


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _sequential(module: nn.Module, span: tuple[int, int]) -> nn.Sequential:
    """A Sequential of some children, under their names."""
    made = nn.Sequential()
    made._modules.update(list(_children(module).items())[slice(*span)])
    return made


def _runs(module: nn.Module, reading: Reading | None) -> Iterator[tuple[tuple[int, int], Reading]]:
    """The blocks that are several children of a module that runs its children in order."""
    children = list(_children(module).values())
    is_sequential = isinstance(module, nn.Sequential) and not overrides_call(module)
    if not (is_sequential and type(module).forward is nn.Sequential.forward) and (
        reading is None or not _runs_in_order(module, children, reading)
    ):
        return
    first = 0
    while first < len(children):
        spans, _, is_sized = _longest(module, children[first:])
        stop = first + 1
        for i, span in enumerate(spans):
            begin, end = first + span.first_call, first + span.last_call
            stop = max(stop, end + 1)
            shared = (i > 0 and spans[i - 1].last_call == span.first_call) or (
                i + 1 < len(spans) and spans[i + 1].first_call == span.last_call
            )
            # Two convolutions that only follow one another are often no block.
            is_block = isinstance(span.layer, BlockLayers) and not span.layer.config.dense
            if is_block and end > begin and not shared:
                yield (begin, end + 1), Reading((span.layer,), is_sized)
        first = stop


def _runs_in_order(module: nn.Module, children: list[nn.Module], reading: Reading) -> bool:
    if len(reading.layers) < 2:
        return False
    spans, stop, _ = _longest(module, children)
    return stop == len(children) and same_layers([s.layer for s in spans], reading.layers)


def _longest(module: nn.Module, children: list[nn.Module]) -> tuple[list[Span], int, bool]:
    """The layers of as many of the first children as are a chain of layers, how many children
    these are, and whether all that is so for some shapes alone.
    """
    try:
        shape = (1, guess_channels(children), 224, 224)
        trace, _ = follow(module, shape, children)
    except Declined:
        return [], 0, False
    for count in range(len(trace.outputs), 0, -1):
        try:
            return spans_of(trace, count), count, trace.is_sized
        except Declined:
            continue
    return [], 0, False


def _is_declined_block(module: nn.Module, inside: list[Found]) -> bool:
    """Whether a declined module is a depthwise convolution with others, and not much more, or has
    that inside it as an nn.Sequential.
    """
    if not has_depthwise(module):
        return False
    if len(inside) > 1 or any(found.reason is None for found in inside):
        return False
    kinds = [isinstance(part, nn.Sequential) for part in (module, *(f.module for f in inside))]
    if inside and kinds != [False, True]:
        return False
    return 2 <= sum(map(is_image_weight, module.parameters())) <= _MOST_CONVOLUTIONS
