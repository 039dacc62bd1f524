"""Whole networks in one call: what `fuse` does for a model that is a chain of layers.

The model keeps its object, its children and its class, of which it becomes an instance of a
subclass: calls of `model(x)` for inference on a CPU run all layers as one program, with the
parameters as they are. All other calls run the class's own forward.
"""

from collections.abc import Callable
from functools import cache, wraps
from types import MethodType

import torch
from torch import Tensor, nn

from ..modules.fused_module import FusedModule
from ..modules.stand_in import StandIn
from ..modules.tracing import is_plain_call
from ..network.live import LiveNetwork
from ..recognizers import evaluation_mode, guess_channels
from .sequential import FusedChain, FusedSequential


class _Forward(LiveNetwork):
    """The forward that the class of a network had."""

    def calls(self) -> list[Callable[[Tensor], Tensor]]:
        kinds = (vars(kind).get("_class_before") for kind in type(self.module).__mro__)
        kind = next((found for found in kinds if found is not None), type(self.module))
        return [MethodType(kind.forward, self.module)]


class WholeNetwork(nn.Module):
    """First base of the class that a whole network gets."""

    _whole: LiveNetwork | None = None

    def _run_whole(self, *args, **kwargs) -> Tensor | None:
        """The result in one call; None where the network's own forward has to give it."""
        if torch.compiler.is_compiling():
            return None
        x = args[0] if len(args) == 1 and not kwargs else None
        whole = self._whole  # Read once: another thread may drop it.
        if whole is None or self.training or not is_plain_call(x):
            return None
        if whole.module is not self or "forward" in vars(self):
            return None
        state = whole.look()
        done = None if state is None else whole.run(state, x)
        return None if done is None else done[0]

    def train(self, mode: bool = True) -> nn.Module:
        whole = self._whole
        if whole is not None and whole.module is self and whole.is_in_mode(mode):
            return self
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A replica that runs the layers, because folded weights are on the first device."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_whole"] = None
        return replica

    def __reduce_ex__(self, protocol):
        new, arguments, *state = super().__reduce_ex__(protocol)
        kind = _class_before(type(self))
        # The class has no name that pickle could import it by; one derived from it may have.
        return (new, arguments, *state) if kind is None else (_rebuild, (kind,), *state)


def make_whole(model: nn.Module) -> None:
    """Make every network inside a fused model that is one chain run as a whole, in place."""
    with evaluation_mode(model):
        _make_whole(model)


def _make_whole(model: nn.Module) -> None:
    if isinstance(model, FusedModule | FusedChain | WholeNetwork | torch.jit.ScriptModule):
        return
    if not any(isinstance(inner, FusedModule | FusedChain) for inner in model.modules()):
        return
    if type(model).forward is not nn.Module.forward and _is_chain(model):
        model.__class__ = _class_for(type(model))
        model.__dict__["_whole"] = _Forward(model)
        return
    for child in model.children():
        _make_whole(child)


def _is_chain(model: nn.Module) -> bool:
    if len(list(model.children())) < 2 and isinstance(next(model.children()), FusedSequential):
        return False  # It does nothing that its child does not do.
    part, _ = _Forward(model).part((1, guess_channels([model]), 224, 224))
    return bool(part.layers)


def make_parts(model: nn.Module) -> None:
    """Restore the original class of every network that runs as one call, in place."""
    for module in model.modules():
        if isinstance(module, WholeNetwork):
            module.__dict__.pop("_whole", None)
            kind = _class_before(type(module))
            if kind is not None:
                module.__class__ = kind


def is_whole(model: nn.Module) -> bool:
    """Whether calls of the model run as one."""
    if isinstance(model, WholeNetwork):
        return model._whole is not None
    return isinstance(model, StandIn) and isinstance(model, FusedModule | FusedSequential)


def _class_before(kind: type[WholeNetwork]) -> type[nn.Module] | None:
    """The class that a whole network had; None for classes that others have derived from it."""
    return vars(kind).get("_class_before")


@cache
def _class_for(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` that runs as a whole; under its own name, by which some code recognises models."""

    @wraps(kind.forward)
    def forward(self, *args, **kwargs):
        y = self._run_whole(*args, **kwargs)
        return kind.forward(self, *args, **kwargs) if y is None else y

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    members = {"forward": forward, "_class_before": kind, **names}
    return type(kind.__name__, (WholeNetwork, kind), members)


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    whole = _class_for(kind)
    return whole.__new__(whole)
