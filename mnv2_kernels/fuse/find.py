"""Where the blocks of a model are: what `fuse` replaces and what `explain` tells of."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..block.fold import BlockLayers
from ..modules.fused_module import FusedInvertedResidual, FusedModule
from ..recognizers import Declined, recognize
from ..recognizers.chains import Run, chain, find_runs, part
from .same_padding import FusedSamePadding
from .sequential import FusedChain, FusedRun, FusedSequential, FusedSequentialBlock


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
        yield from _fused_runs(name, module, seen)
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
                for run in find_runs(module):
                    yield from _found_run(name, module, run, seen)
    for child_name, child in module.named_children():
        yield from _find(_join(name, child_name), child, seen, in_declined)


def _fused_runs(name: str, module: FusedChain, seen: set[nn.Module]) -> Iterator[Found]:
    """The runs that are fused, and between them those that were declined."""
    fused = {run.start: run for run in module.runs}
    inside = {i for run in module.runs for i in range(run.start, run.stop)}
    declined = {
        run.start: run
        for run in find_runs(module.original)
        if run.layers is None and inside.isdisjoint(range(run.start, run.stop))
    }
    for start in sorted([*fused, *declined]):
        if start in declined:
            yield from _found_run(name, module, declined[start], seen)
            continue
        _, stop, block = fused[start]
        children = list(block.original._modules.items())
        first = _join(name, children[0][0])
        yield Found(f"{name}[{start}:{stop}]", first, module, (start, stop), fused=block)
        seen.update(child for _, child in children)


def _found_run(name: str, module: nn.Module, run: Run, seen: set[nn.Module]) -> Iterator[Found]:
    """A run that can be fused, or was declined and what is inside it."""
    span = run.start, run.stop
    original = module.original if isinstance(module, FusedChain) else module
    inside = list(chain(original).items())[run.start : run.stop]
    first = _join(name, inside[0][0])
    found = f"{name}[{run.start}:{run.stop}]"
    yield Found(found, first, module, span, layers=run.layers, reason=run.reason)
    for child_name, child in inside:
        if run.layers is None:
            yield from _find(_join(name, child_name), child, seen, True)
        seen.add(child)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
