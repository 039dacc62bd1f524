"""Whole networks in one call: what `fuse` does for a model that is a chain from stem to classifier.

The model keeps its object, its children and its class, of which it becomes an instance of a
subclass: calls of `model(x)` for inference on a CPU run all layers as one program, with the
parameters as they are. All other calls run the class's own forward.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps

import torch
from torch import Tensor, nn

from ..modules.fused_module import FusedModule
from ..modules.unchanged import Unchanged
from ..network import read as network
from ..recognizers import Declined
from ..recognizers.layers import check_untouched
from .links import AverageLink, BlockLink, LinearLink, Link, convolution_link
from .live_network import Joined, may_join
from .sequential import FusedChain, FusedSequential, links_of

# Whose forwards are known to do nothing but compute: a call of them can be left out.
_LIBRARIES = ("mnv2_kernels", "torchvision", "timm", "efficientnet_lite_pytorch")


class Whole:
    """The layers of a network, and what its forward calls, as they were when it was read.

    Raises:
        Declined: the forward is no chain of such layers, or may do more than compute.
    """

    def __init__(self, model: nn.Module):
        # Not while it is traced, when parameters are no tensors.
        parts = {module: module for module in model.modules() if _is_part(module)}
        read = network.read_network(model, parts.get, _only_computes)
        self.model = model
        self._layers = list(_with_averages(read.layers))
        self._called = [Unchanged(module, attributes=True) for module in read.called]
        for place in self._called:
            if replaced := place.replaced_methods():
                raise Declined(f"{', '.join(replaced)} of a module has been replaced")
        self._called[0].kind = _class_for(type(model))
        self._called[0].names.add("_whole")
        self._parts = [layer.layers for layer in self._layers if isinstance(layer, network.Block)]
        self._joined: tuple[list[int], Joined | None] | None = None
        if self._join() is None:
            raise Declined("a part of it cannot run together with the others")

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is the network of that very model, with the modules that it had."""
        return model is self.model and all(place.has_its_children() for place in self._called)

    def run(self, x: Tensor) -> Tensor | None:
        """What the model makes of x (N, C, H, W); None where its own forward has to run."""
        changes = [part.changes for part in self._parts if isinstance(part, FusedSequential)]
        made = self._joined  # Read once: another thread may drop it.
        if made is None or made[0] != changes:
            self._joined = made = (changes, self._join())
        return None if made[1] is None else made[1].run(x)

    def forget(self) -> None:
        """Drop what was folded: the next call folds again."""
        self._joined = None

    def _join(self) -> Joined | None:
        links: list[Link] = []
        around = list(self._called)
        for layer in self._layers:
            match layer:
                case network.Block(_, nn.Module() as part):
                    found = links_of(part)
                    if found is None:
                        return None
                    links += found.links
                    around += map(Unchanged, found.inside)
                case network.Convolution(_, stage, padding, modules):
                    link = convolution_link(nn.Sequential(*modules), stage, padding)
                    if link is None:
                        return None
                    links.append(link)
                case network.Pool():
                    links.append(AverageLink())
                case network.Classifier(_, linear):
                    links.append(LinearLink(linear))
                case _:
                    return None
        if any(link.is_stem for link in links[1:]):
            return None
        has_blocks = any(isinstance(link, BlockLink) for link in links)
        return Joined(links, around) if has_blocks and len(links) > 1 else None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_joined": None}


def _is_part(module: nn.Module) -> bool:
    """Whether a module gives links: a fused block, a Sequential of such."""
    if isinstance(module, FusedModule):
        return True
    return isinstance(module, FusedSequential) and links_of(module) is not None


def _with_averages(layers: Iterable[network.Layer]) -> Iterable[network.Layer]:
    """The layers without the flattenings, which have to stand behind averages.

    Raises:
        Declined: they stand elsewhere, or something beside the classifier follows an average.
    """
    averaged = keeps_dims = False
    for layer in layers:
        match layer:
            case network.Pool() if not averaged:
                averaged, keeps_dims = True, layer.keeps_dims
                yield layer
            case network.Flatten() if keeps_dims:
                keeps_dims = False
            case network.Classifier() if averaged and not keeps_dims:
                if type(layer.linear) is not nn.Linear:
                    raise Declined(f"{layer.name} is no plain nn.Linear")
                check_untouched(layer.linear)
                yield layer
            case network.Block() | network.Convolution() if not averaged:
                yield layer
            case _:
                raise Declined(f"{layer.name} does not follow what is before it")
    if keeps_dims:
        raise Declined("its result is not flattened")


class WholeNetwork(nn.Module):
    """First base of the class that a whole network gets."""

    _whole: Whole | None = None

    def _run_whole(self, *args, **kwargs) -> Tensor | None:
        """The result in one call; None where the network's own forward has to give it."""
        x = args[0] if len(args) == 1 and not kwargs else None
        if (
            self._whole is None
            or not isinstance(x, Tensor)
            or torch.compiler.is_compiling()
            or self.training
            or not may_join(x)
        ):
            return None
        whole = self._whole  # Read once: another thread may drop it.
        y = whole.run(x) if whole is not None and whole.model is self else None
        if y is None and not (whole is not None and whole.is_of(self)):
            self.__dict__["_whole"] = None  # It would keep what has been replaced.
        return y

    def train(self, mode: bool = True) -> nn.Module:
        self._forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> nn.Module:
        self._forget()
        return super()._apply(*args, **kwargs)

    def _forget(self) -> None:
        whole = self._whole
        if whole is not None:
            whole.forget()

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A replica that runs the layers: the links are those of the first device."""
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
    if isinstance(model, FusedModule | FusedChain | WholeNetwork):
        return
    if _is_of_a_library(model) and _becomes_whole(model):
        return
    for child in model.children():
        make_whole(child)


def make_parts(model: nn.Module) -> None:
    """Give every whole network inside a model its own class again, in place."""
    for module in model.modules():
        if isinstance(module, WholeNetwork):
            module.__dict__.pop("_whole", None)
            kind = _class_before(type(module))
            if kind is not None:
                module.__class__ = kind


def _is_of_a_library(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _LIBRARIES


def _only_computes(module: nn.Module) -> bool:
    return _is_of_a_library(module) or type(module).__module__.startswith("torch.nn.")


def _becomes_whole(model: nn.Module) -> bool:
    if not any(isinstance(m, FusedModule | FusedSequential) for m in model.modules()):
        return False
    try:
        with _evaluation_mode(model):
            whole = Whole(model)
    except Declined:
        return False
    model.__dict__["_whole"] = whole
    model.__class__ = _class_for(type(model))
    return True


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The flags alone: what is cached stays."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training


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
