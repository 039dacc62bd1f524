"""Blocks inside nn.Sequential: the container runs some of its consecutive children in one pass.

The children stay where they are, under their names. Whoever iterates over the container or calls a
child gets the layers themselves, and a slice runs in one pass what lies in it as a whole: nothing
depends on who runs them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .fused import FusedInvertedResidual
from .stand_in import StandIn


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

    def __init__(self, original: nn.Sequential, runs: Sequence[FusedRun]):
        super().__init__(original, list(original._modules), runs)

    def _slice(self, index: slice) -> nn.Sequential:
        part = super()._slice(index)
        start, stop, step = index.indices(len(self))
        inside = [
            FusedRun(run.start - start, run.stop - start, run.block)
            for run in self.runs
            if step == 1 and start <= run.start and run.stop <= stop and self.unchanged()
        ]
        return FusedSequential(part, inside) if inside else part


class FusedSequentialBlock(_Sliced, FusedInvertedResidual, nn.Sequential):
    """An nn.Sequential that is one block."""
