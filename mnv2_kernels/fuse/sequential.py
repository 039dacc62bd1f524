"""Blocks inside nn.Sequential: the container runs some of its consecutive children in one pass.

What is no module of its own is a block of consecutive children (`FusedRun`), and blocks that follow
one another are one call (`joined`).

The children stay where they are, under their names. Whoever iterates over the container or calls a
child gets the layers themselves, and a slice runs in one pass what lies in it as a whole: nothing
depends on who runs them.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..block.fold import ConvNorm
from ..modules.fused_module import FusedInvertedResidual, FusedModule
from ..modules.stand_in import StandIn
from ..modules.unchanged import Unchanged
from ..recognizers import Declined
from ..recognizers.layers import append
from .links import BlockLink, Link, link_of
from .live_network import Joined, may_join


class FusedRun(NamedTuple):
    """The children start:stop of a chain, and the block that computes what they do.

    `block` is no child of the chain; its `original` is a Sequential of these children.
    """

    start: int
    stop: int
    block: FusedInvertedResidual


class FusedChain(StandIn):
    """A module that runs its children `names` in order, some of them together in one pass."""

    def __init__(self, original: nn.Module, names: Sequence[str], runs: Sequence[FusedRun]):
        super().__init__(original)
        # Not to be seen as children.
        self.__dict__["runs"] = tuple(runs)
        self.__dict__["_names"] = tuple(names)
        self.__dict__["_keys"] = list(self._modules)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """What the original computes; by its own forward where children have been exchanged."""
        if not isinstance(x, Tensor) or not self.unchanged():
            return self.plain_forward(x, *args, **kwargs)
        at = 0
        for start, stop, block in self.runs:
            for name in self._names[at:start]:
                x = self._modules[name](x)
            block.training = self.training
            x = block.forward(x)
            at = stop
        for name in self._names[at:]:
            x = self._modules[name](x)
        return x

    def unchanged(self) -> bool:
        """Whether the children are those that the runs were found in, in the same places."""
        if list(self._modules) != self._keys:
            return False
        return all(
            self._modules[name] is child
            for run in self.runs
            for name, child in run.block.original._modules.items()
        )

    def train(self, mode: bool = True) -> "FusedChain":
        for run in self.runs:
            run.block.forget_folded()
            run.block.training = mode
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "FusedChain":
        for run in self.runs:
            run.block.forget_folded()
        return super()._apply(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> "FusedChain":
        """A replica that runs the layers, as those of single blocks do."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["forward"] = replica.plain_forward
        return replica

    def extra_repr(self) -> str:
        return ", ".join(f"fused [{r.start}:{r.stop}] {r.block.config.name}" for r in self.runs)


class _Sliced(StandIn):
    """A stand-in of an nn.Sequential, which it is too."""

    def _slice(self, index: slice) -> nn.Sequential:
        part = nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        part.training = self.training
        return part

    def __getitem__(self, index):
        return self._slice(index) if isinstance(index, slice) else super().__getitem__(index)

    def __delitem__(self, index) -> None:
        super().__delitem__(index)
        # nn.Sequential numbers the rest anew in a dictionary of its own.
        self.original.__dict__["_modules"] = self._modules


class FusedSequential(_Sliced, FusedChain, nn.Sequential):
    """An nn.Sequential that runs some of its consecutive children in one pass."""

    def __init__(self, original: nn.Sequential, runs: Sequence[FusedRun] = ()):
        super().__init__(original, list(original._modules), runs)
        self.__dict__["_parts"] = None
        # Counts how often `_parts` has been dropped.
        self.__dict__["changes"] = 0

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """What the original computes."""
        if not isinstance(x, Tensor):
            return self.plain_forward(x)  # All that an nn.Sequential takes.
        if torch.compiler.is_compiling() or self.training or args or kwargs or not may_join(x):
            return super().forward(x, *args, **kwargs)
        if not self.unchanged():
            return self.plain_forward(x)
        for _, _, block in self.runs:
            block.training = False
        for joined, steps in self._current_parts():
            y = None if joined is None else joined.run(x)
            if y is None:
                y = x
                for step in steps:
                    y = step(y)
            x = y
        return x

    def steps(self) -> list[nn.Module]:
        """The blocks of the runs, and the children beside them: a convolution together with the
        norm and the clip that follow it.
        """
        steps, at = [], 0
        children = list(self._modules.values())
        for start, stop, block in self.runs:
            steps += [*_stages(children[at:start]), block]
            at = stop
        return [*steps, *_stages(children[at:])]

    def _current_parts(self) -> list[tuple[Joined | None, list[nn.Module]]]:
        """The steps, those that can run as one call together."""
        children = list(self._modules.values())
        parts = self._parts  # Read once: another thread may drop it.
        if parts is None or parts[0] != children:
            self.__dict__["_parts"] = parts = (children, list(_join(self.steps())))
        return parts[1]

    def train(self, mode: bool = True) -> "FusedSequential":
        self._forget_parts()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "FusedSequential":
        self._forget_parts()
        return super()._apply(*args, **kwargs)

    def _forget_parts(self) -> None:
        self.__dict__["_parts"] = None
        self.__dict__["changes"] += 1

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_parts": None}

    def _slice(self, index: slice) -> nn.Sequential:
        part = super()._slice(index)
        start, stop, step = index.indices(len(self))
        inside = [
            FusedRun(run.start - start, run.stop - start, run.block)
            for run in self.runs
            if step == 1 and start <= run.start and run.stop <= stop and self.unchanged()
        ]
        return FusedSequential(part, inside) if inside or _joins(part) else part


class Links(NamedTuple):
    """What can run together of a module, one link or several, and the containers around them."""

    links: list[Link]
    inside: list[nn.Module]


def links_of(module: nn.Module) -> Links | None:
    """All of a module as links; None where some of it is no such layer."""
    one = _one_link(module)
    if one is not None:
        return one
    if isinstance(module, FusedSequential) and module.unchanged():
        steps = module.steps()
    elif type(module) is nn.Sequential:
        steps = list(_stages(list(module)))
    else:
        return None
    # What is no child is a stage or a block: no link in parts if it is none as a whole.
    found = [links_of(step) if step in module else _one_link(step) for step in steps]
    if None in found or not found:
        return None
    links = [link for part in found for link in part.links]
    if any(link.is_stem for link in links[1:]):
        return None
    return Links(links, [module, *(m for part in found for m in part.inside)])


def _one_link(module: nn.Module) -> Links | None:
    link = link_of(module)
    return None if link is None else Links([link], [])


def join_all(module: nn.Module) -> nn.Module:
    """The module with every nn.Sequential inside it that has blocks to join as a `FusedSequential`.

    `module` itself is changed, or replaced where it is such a Sequential.
    """
    made: dict[nn.Module, nn.Module] = {}

    def visit(inner: nn.Module) -> nn.Module:
        if inner not in made:
            made[inner] = inner
            if not isinstance(inner, FusedModule):
                for name, child in inner._modules.items():
                    inner._modules[name] = None if child is None else visit(child)
            if type(inner) is nn.Sequential and _joins(inner):
                made[inner] = FusedSequential(inner)
        return made[inner]

    return visit(module)


def _stages(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """Layers, each convolution in a Sequential with the norm and the clip behind it."""
    at = 0
    while at < len(layers):
        stop = at + 1
        if isinstance(layers[at], nn.Conv2d):
            stage = ConvNorm(layers[at], None)
            with suppress(Declined):
                for layer in layers[stop:]:
                    stage = append(stage, layer)
                    stop += 1
        yield layers[at] if stop == at + 1 else nn.Sequential(*layers[at:stop])
        at = stop


def _joins(module: nn.Sequential) -> bool:
    """Whether some of the children can run as one call."""
    if not any(isinstance(child, FusedModule | FusedSequential) for child in module):
        return False
    return any(joined is not None for joined, _ in _join(list(_stages(list(module)))))


def _join(steps: list[nn.Module]) -> Iterator[tuple[Joined | None, list[nn.Module]]]:
    """Steps in the order they run, with what runs several of them as one call.

    A stem can only be the first of those, and a block has to be among them.
    """
    taken: list[nn.Module] = []
    found: list[Links] = []

    def joined() -> Joined | None:
        links = [link for part in found for link in part.links]
        if len(links) < 2 or not any(isinstance(link, BlockLink) for link in links):
            return None
        return Joined(links, [Unchanged(m) for part in found for m in part.inside])

    for step in steps:
        part = links_of(step)
        if taken and (part is None or part.links[0].is_stem):
            yield joined(), taken
            taken, found = [], []
        if part is None:
            yield None, [step]
        else:
            taken, found = [*taken, step], [*found, part]
    if taken:
        yield joined(), taken


class FusedSequentialBlock(_Sliced, FusedInvertedResidual, nn.Sequential):
    """An nn.Sequential that is one block."""
