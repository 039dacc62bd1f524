"""Blocks inside nn.Sequential: the container runs some of its consecutive children in one pass.

What is no module of its own is a block of consecutive children (`FusedRun`), and layers that follow
one another are one call (`network.live`).

The children stay where they are, under their names. Iterating over the container, or calling a
child, gives the layers themselves. A slice runs in one pass the blocks that are wholly in it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modules.fused_module import FusedInvertedResidual, FusedModule
from ..modules.kept import Kept
from ..modules.stand_in import StandIn
from ..modules.tracing import is_plain_call
from ..network.live import LiveNetwork
from ..ops.backends import asked_once_a_graph
from ..recognizers import Recorded, evaluation_mode, guess_channels, runs_in_order


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
        self._pass_on_mode()
        if not _is_plain(x) or args or kwargs or not self.unchanged():
            return self.plain_forward(x, *args, **kwargs)
        if not self._runs_in_order(x):
            return self.plain_forward(x)
        at = 0
        while at < len(self._names):
            x, at = self._run_one(x, at)
        return x

    def _runs_in_order(self, x: Tensor) -> bool:
        """Whether the original's own forward runs the children one by one, for such an x."""
        return True

    @property
    def fused_blocks(self) -> list[FusedInvertedResidual]:
        """The blocks that run here; their children are children of the chain."""
        return [run.block for run in self.runs]

    def _run_one(self, x: Tensor, at: int) -> tuple[Tensor, int]:
        """(result, next child) of the child `at`, or of the run that begins there."""
        for start, stop, block in self.runs:
            if start == at:
                block.training = self.training
                return block.forward(x), stop
        return self._modules[self._names[at]](x), at + 1

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
            run.block.training = mode
            run.block.original.training = mode
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> "FusedChain":
        """A replica that runs the layers, as replicas of single blocks do."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["forward"] = replica.plain_forward
        return replica

    def extra_repr(self) -> str:
        return ", ".join(f"fused [{r.start}:{r.stop}] {r.block.config.name}" for r in self.runs)


class FusedInOrder(FusedChain):
    """A module whose own forward runs its children in order."""

    def __init__(self, original: nn.Module, names: Sequence[str], runs: Sequence[FusedRun]):
        super().__init__(original, names, runs)
        # By mode, so that a model that trains and evaluates by turns is read once for each.
        self.__dict__["_kept"] = {mode: Kept(self) for mode in (False, True)}

    def _runs_in_order(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return not self.training and self._always_runs_in_order()
        state = self._kept[self.training].look()
        if state.why_blind is not None:
            return False
        known = state.readings.get("all")
        if known is None:
            known = state.readings.get(x.shape)
        if known is None:
            known, for_all = runs_in_order(self.original, self._called(), x.shape, self.training)
            state.readings.keep("all" if for_all else x.shape, known)
        return known

    @asked_once_a_graph
    def _always_runs_in_order(self) -> bool:
        children = self._called()
        shape = (1, guess_channels(children), 224, 224)
        return all(runs_in_order(self.original, children, shape))

    def _called(self) -> list[nn.Module]:
        return [self._modules[name] for name in self._names]


def _is_plain(x: object) -> bool:
    return isinstance(x, Tensor) and type(x) is not Recorded


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


class _Children(LiveNetwork):
    """The children of an nn.Sequential."""

    def calls(self) -> list[nn.Module]:
        return list(self.module._modules.values())


class FusedSequential(_Sliced, FusedChain, nn.Sequential):
    """An nn.Sequential that runs some of its consecutive children in one pass."""

    def __init__(self, original: nn.Sequential, runs: Sequence[FusedRun] = ()):
        super().__init__(original, list(original._modules), runs)
        self.__dict__["_live"] = _Children(self)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """What the original computes."""
        self._pass_on_mode()
        if not _is_plain(x):
            return self.plain_forward(x)  # All that an nn.Sequential takes.
        if torch.compiler.is_compiling() or self.training or args or kwargs or not is_plain_call(x):
            return super().forward(x, *args, **kwargs)
        if not self.unchanged():
            return self.plain_forward(x)
        state = self._live.look()
        if state is None:
            return super().forward(x)
        at = 0
        while at < len(self._names):
            done = self._live.run(state, x, at) if is_plain_call(x) else None
            x, at = self._run_one(x, at) if done is None else done
        return x

    def train(self, mode: bool = True) -> "FusedSequential":
        return self if self._live.is_in_mode(mode) else super().train(mode)

    def _slice(self, index: slice) -> nn.Sequential:
        part = super()._slice(index)
        start, stop, step = index.indices(len(self))
        inside = [
            FusedRun(run.start - start, run.stop - start, run.block)
            for run in self.runs
            if step == 1 and start <= run.start and run.stop <= stop and self.unchanged()
        ]
        return FusedSequential(part, inside) if inside or _joins(part) else part


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


def _joins(module: nn.Sequential) -> bool:
    """Whether some of the children can run as one call."""
    if not any(isinstance(child, FusedModule | FusedSequential) for child in module):
        return False
    live = _Children(module)
    with evaluation_mode(module):
        at = 0
        while at < len(module):
            channels = guess_channels(list(module)[at:])
            part, _ = live.part((1, channels, 224, 224), at)
            if part.layers:
                return True
            at += 1
    return False


class FusedSequentialBlock(_Sliced, FusedInvertedResidual, nn.Sequential):
    """An nn.Sequential that is one block."""
