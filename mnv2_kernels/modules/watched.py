"""What a fused forward takes for granted of the layers it stands for, and how it sees a change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, contains
from typing import Any

import torch
from torch import Tensor, nn

from ..block.fold import ConvNorm
from .freeze import thawed
from .versions import state_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_geometry_of = attrgetter("stride", "padding", "dilation", "padding_mode")
_bounds_of = attrgetter("min_val", "max_val")
_eps_of = attrgetter("eps")
# Of a `Watched`: lists all.
_FIELDS = (
    "batch_norms",
    "hooks",
    "families",
    "childless",
    "children",
    "fixed",
    "kinds",
    "kinds_of_norms",
    "own",
    "own_of_convs",
    "convs",
    "activations",
    "geometry",
    "bounds",
    "norms",
    "places",
    "tables",
    "names",
    "means",
    "shapes",
)


class Watched:
    """What a fused forward of the stages in a module looks at on every call, gathered once so that
    looking is cheap.
    """

    def __init__(
        self, module: nn.Module, stages: Sequence[ConvNorm] = (), further: Sequence[nn.Module] = ()
    ):
        """`further` are modules beside those of the stages whose tensors matter too."""
        inner = [m for m in module.modules() if m is not module]
        norms = [s.norm for s in stages if s.norm is not None]
        self.batch_norms = [n for n in norms if isinstance(n, nn.modules.batchnorm._BatchNorm)]
        self.hooks = [getattr(m, kind) for m in inner for kind in _HOOKS]
        families = [m._modules for m in (module, *inner)]
        self.families = [f for f in families if f]
        # A parametrization would become the first child of a module without any.
        self.childless = [f for f in families if not f]
        self.children = self.current_children()
        self.norms = norms
        self.fixed = [m for m in inner if m not in norms]
        self.convs = [s.conv for s in stages]
        self.kinds = self.current_kinds()
        # Freezing gives norms another class.
        self.kinds_of_norms = [*map(thawed, self.current_norms())]
        self._find_own()
        self.activations = [m for m in inner if isinstance(m, nn.Hardtanh)]
        self.geometry = self.current_geometry()
        self.bounds = self.current_bounds()
        # Where the tensors are looked up: a parameter may be replaced by another.
        self.places = [
            (tensors, name, module)
            for module in (*self.convs, *norms, *further)
            for tensors in (module._parameters, module._buffers)
            for name in tensors
            if name != "num_batches_tracked"
        ]
        self.tables = [tensors for tensors, _, _ in self.places]
        self.names = [name for _, name, _ in self.places]
        self.means = [tensors for tensors, name, _ in self.places if name == "running_mean"]
        self.shapes = self.current_shapes()

    def _find_own(self) -> None:
        self.own = [m.__dict__ for m in (*self.fixed, *self.norms)]
        self.own_of_convs = [conv.__dict__ for conv in self.convs]

    def __setstate__(self, state: dict) -> None:
        """A copy of a module has another `__dict__` than the copy of its `__dict__`."""
        self.__dict__.update(state)
        self._find_own()

    @classmethod
    def together(cls, parts: Sequence["Watched"]) -> "Watched":
        """All of them as one, which is cheaper to look at."""
        whole = cls.__new__(cls)
        for name in _FIELDS:
            setattr(whole, name, list(chain.from_iterable(getattr(p, name) for p in parts)))
        return whole

    def why_changed(self) -> str | None:
        """What happened to the inner layers that only the plain layers follow."""
        touched = self.why_touched()
        if touched is None and self.has_other_shapes():
            return "a parameter or buffer has another shape: unfuse, then fuse again"
        return touched

    def has_other_shapes(self) -> bool:
        shapes = self.current_shapes()
        return shapes != self.shapes and any(map(_is_other, shapes, self.shapes))

    def why_touched(self) -> str | None:
        """The same but for shapes, which change together with `state`."""
        if any(self.hooks):
            return "an inner module has hooks"
        if self.current_children() != self.children or any(self.childless):
            return "inner modules have been replaced: unfuse, then fuse again"
        if self._has_other_forward():
            return "the class or the forward of an inner module has been replaced"
        if self.current_geometry() != self.geometry or self.current_bounds() != self.bounds:
            return "a convolution or a clip has been changed: unfuse, then fuse again"
        if not all(map(contains, self.tables, self.names)):
            return "a parameter or buffer has been deleted: unfuse, then fuse again"
        if any(tensors["running_mean"] is None for tensors in self.means):
            return "a batch norm has lost its running statistics"
        return None

    def _has_other_forward(self) -> bool:
        norms = self.current_norms()
        if norms != self.kinds_of_norms:
            norms = [*map(thawed, norms)]
        return (
            norms != self.kinds_of_norms
            or self.current_kinds() != self.kinds
            or any("forward" in own for own in self.own)
            or any("_conv_forward" in own for own in self.own_of_convs)
        )

    def current_children(self) -> list[nn.Module]:
        return list(chain.from_iterable(map(dict.values, self.families)))

    def current_kinds(self) -> list:
        return [*map(type, self.fixed)]

    def current_norms(self) -> list:
        return [*map(type, self.norms)]

    def current_geometry(self) -> list:
        return [*map(_geometry_of, self.convs)]

    def current_bounds(self) -> list:
        return [*map(_bounds_of, self.activations)]

    def current_shapes(self) -> list[torch.Size | None]:
        return [
            None if (t := tensors[name]) is None else t.shape for tensors, name, _ in self.places
        ]

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer that the folded weights are computed from."""
        return [t for tensors, name, _ in self.places if (t := tensors[name]) is not None]

    def owners(self) -> list[tuple[nn.Module, str]]:
        """Module and name of every one of `tensors()`."""
        return [
            (module, name) for tensors, name, module in self.places if tensors[name] is not None
        ]

    def state(self) -> list | None:
        """What changes whenever the folded weights would; None where that cannot be seen."""
        found = (n._buffers.get("num_batches_tracked") for n in self.batch_norms)
        counters = [t for t in found if t is not None]
        return state_of(self.tensors(), [*map(_eps_of, self.norms)], counters)


def _is_other(now: torch.Size | None, before: torch.Size | None) -> bool:
    """Whether a shape has changed; a bias may be taken away."""
    return now is not None and now != before


@dataclass(frozen=True, eq=False)
class Folded:
    """What was computed from the tensors that a `Watched` watches, and their state then.

    The aliases keep the old storages alive, so that no new tensor gets their address.
    """

    state: list
    value: Any
    aliases: list[Tensor]


def fold_once(watched: Watched, known: Folded | None, fold: Callable[[], Any]) -> Folded | None:
    """`known` while no tensor has changed since, otherwise what `fold` computes now.

    None where changes cannot be seen.
    """
    state = watched.state()
    if state is None or (known is not None and known.state == state):
        return None if state is None else known
    aliases = [t.detach() for t in watched.tensors()]
    # Not inference tensors: a later call may need gradients of x through them.
    with torch.inference_mode(False), torch.no_grad():
        return Folded(state, fold(), aliases)
