"""Where the blocks of a model are: what `fuse` replaces and what `explain` tells of."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .chained import FusedChain, FusedRun, FusedSequential, FusedSequentialBlock
from .fold import BlockLayers
from .fused import FusedInvertedResidual, FusedModule
from .recognizers import Declined, recognize
from .recognizers.chains import chain, find_runs, part
from .same_padding import FusedSamePadding


@dataclass(frozen=True)
class Found:
    """One block of a model: fused already, one that can be (`layers`), or declined (`reason`).

    `module` is the block itself, or with `span` the module whose children start:stop it is. The
    input of the module named `first` is that of the block.
    """

    name: str
    first: str
    module: nn.Module
    span: tuple[int, int] | None = None
    fused: FusedModule | None = None
    layers: BlockLayers | None = None
    reason: str | None = None

    def make(self) -> FusedInvertedResidual:
        """The block that can be fused, fused."""
        original = self.module
        if self.span is not None:
            original = part(chain(original), *self.span)
            original.training = self.module.training
        elif isinstance(original, nn.Sequential):
            return FusedSequentialBlock(original, self.layers)
        kind = FusedSamePadding if self.layers.same_padding else FusedInvertedResidual
        return kind(original, self.layers)


def find(model: nn.Module) -> Iterator[Found]:
    """The blocks of a model in the order of its modules; a shared one once, none inside another."""
    return _find("", model, set(), False)


def fused_chain(original: nn.Module, runs: list[FusedRun]) -> FusedChain:
    """A module that runs some of its children as blocks, for one that is a chain."""
    if isinstance(original, nn.Sequential):
        return FusedSequential(original, runs)
    return FusedChain(original, list(chain(original)), runs)


def _find(name: str, module: nn.Module, seen: set[nn.Module], in_declined: bool) -> Iterator[Found]:
    # Nothing inside a scripted module can be read or replaced.
    if module in seen or isinstance(module, torch.jit.ScriptModule):
        return
    seen.add(module)
    if isinstance(module, FusedModule):
        yield Found(name, name, module, fused=module)
        return
    if isinstance(module, FusedChain):
        for start, stop, block in module.runs:
            inside = list(block.original._modules.items())
            first = _join(name, inside[0][0])
            yield Found(f"{name}[{start}:{stop}]", first, module, (start, stop), fused=block)
            seen.update(child for _, child in inside)
    else:
        try:
            layers = recognize(module)
        except Declined as declined:
            yield Found(name, name, module, reason=str(declined))
            in_declined = True
        else:
            if layers is not None and not (in_declined and isinstance(module, nn.Sequential)):
                yield Found(name, name, module, layers=layers)
                return
            if not in_declined:
                yield from _find_runs(name, module, seen)
    for child_name, child in module.named_children():
        yield from _find(_join(name, child_name), child, seen, in_declined)


def _find_runs(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[Found]:
    for run in find_runs(module):
        span = run.start, run.stop
        inside = list(chain(module).items())[run.start : run.stop]
        first = _join(name, inside[0][0])
        found = f"{name}[{run.start}:{run.stop}]"
        yield Found(found, first, module, span, layers=run.layers, reason=run.reason)
        for child_name, child in inside:
            if run.layers is None:
                yield from _find(_join(name, child_name), child, seen, True)
            seen.add(child)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
