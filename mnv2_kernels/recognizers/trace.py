"""What a forward computes: it runs once on a stand-in of a tensor, which records every operation.

The stand-in has a shape, a dtype and a device, but no values. A forward may therefore do whatever
Python can do, as long as that does not depend on values; `operations` lists the operations that are
understood, and every other one is declined by name. Shapes are real ones: what was read of a
forward that has looked at a shape holds for that shape alone (`Trace.is_sized`).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..block import config
from ..block.config import NO_PADDING, Clip, Padding
from ..block.fold import GateLayers
from .declined import Declined, describe

# PyTorch function -> what records it, called with the trace and the function's arguments. The
# module `operations` fills it.
OPERATIONS: dict[Callable, Callable] = {}


@dataclass(frozen=True, eq=False)
class Node:
    """A value of a forward: the operation that made it, and the values that it was made of.

    `call` counts which of the functions given to `trace` was running. `parts` are values that it
    stands for: x * sigmoid(x) is one value of x, and sigmoid(x) a part of it.
    """

    kind: str
    inputs: tuple["Node", ...] = ()
    call: int = 0
    parts: tuple["Node", ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, eq=False)
class Convolution(Node):
    """conv.weight is the weight; the other arguments are those that the forward has given."""

    conv: nn.Module = None
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: Padding = NO_PADDING
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_pointwise(self) -> bool:
        sizes = (self.kernel_size, self.stride, self.padding, self.groups)
        return sizes == ((1, 1), (1, 1), NO_PADDING, 1)


@dataclass(frozen=True, eq=False)
class Norm(Node):
    """A batch norm by running statistics; `norm` has its tensors and eps."""

    norm: nn.Module = None


@dataclass(frozen=True, eq=False)
class Clamp(Node):
    """Values below and above the bounds of `clip` are set to these."""

    clip: Clip = (0.0, 6.0)


@dataclass(frozen=True, eq=False)
class Curve(Node):
    """An activation that is no clip."""

    clip: config.Curve = "silu"


@dataclass(frozen=True, eq=False)
class Gate(Node):
    """A value times what a squeeze-excite makes of it."""

    gate: GateLayers = None


@dataclass(frozen=True, eq=False)
class Unfinished(Node):
    """A value that is understood as a part of another one only; otherwise `reason` says no."""

    reason: Declined = None


@dataclass(frozen=True, eq=False)
class Scale(Unfinished):
    """What a squeeze-excite multiplies by."""

    scale: config.Scale = "sigmoid"


@dataclass(frozen=True, eq=False)
class Pad(Node):
    """Zeros around the rows and columns."""

    padding: Padding = NO_PADDING


@dataclass(frozen=True, eq=False)
class Average(Node):
    """The mean over all pixels."""


@dataclass(frozen=True, eq=False)
class Linear(Node):
    """A fully connected layer."""

    linear: nn.Module = None


# What a forward may ask for: all that is the same for the tensor that it will be called with.
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "layout", "is_quantized", "is_sparse"}


class Recorded(Tensor):
    """A tensor without values; `node` says which value it is, `trace` what it belongs to."""

    node: Node
    trace: "Trace"
    is_shared: bool  # Another tensor may have the same memory.

    @property
    def sizes(self) -> torch.Size:
        """The shape, read without making the reading one of this shape alone."""
        return self.trace.shapes[self.node]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        for value in (*args, *(kwargs or {}).values()):
            trace = _trace_of(value)
            if trace is not None:
                try:
                    return trace.record(function, args, kwargs or {})
                except Declined as reason:
                    # The forward may catch the exception and take another branch.
                    trace.reason = reason
                    raise
        raise Declined(f"{_name_of(function)} is an operation that cannot be followed")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        reason = Declined(f"{_name_of(function)} is an operation that cannot be followed")
        for value in (*args, *(kwargs or {}).values()):
            trace = _trace_of(value)
            if trace is not None:
                trace.reason = reason
        raise reason


def is_known(value: Any) -> bool:
    """Whether it is a tensor with values."""
    return isinstance(value, Tensor) and not isinstance(value, Recorded)


def _trace_of(value: Any) -> "Trace | None":
    if isinstance(value, Recorded):
        return value.trace
    if isinstance(value, tuple | list):
        return next((found for inside in value if (found := _trace_of(inside))), None)
    return None


@dataclass(eq=False)
class Trace:
    """What is recorded while the forward of `module` runs.

    live_norms: whether batch norms may use the statistics of the batch. outputs: what every call
    has given. is_sized: whether a shape was looked at. reason: why the forward that runs is
    declined, once it is.
    """

    module: nn.Module
    live_norms: bool = False
    outputs: list[Node] = field(default_factory=list)
    is_sized: bool = False
    reason: Declined | None = None
    made: list[Node] = field(default_factory=list)
    shapes: dict[Node, torch.Size] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._owners = _owners(self.module)
        self._autocast: tuple | None = None
        self._like: Tensor | None = None
        self.call = 0

    def begin(self, shape: Sequence[int], like: Tensor) -> Recorded:
        """The input of the forward, of the dtype and on the device of `like`."""
        self._like = like
        self._autocast = _autocast_state(like.device.type)
        return self.new(Node("input"), torch.Size(shape))

    def new(self, node: Node, shape: Sequence[int]) -> Recorded:
        """A recorded tensor for `node`."""
        with torch._C.DisableTorchFunctionSubclass():
            made = Tensor._make_wrapper_subclass(
                Recorded,
                torch.Size(shape),
                dtype=self._like.dtype,
                device=self._like.device,
                requires_grad=True,
            )
        made.node, made.trace, made.is_shared = node, self, False
        self.shapes[node] = torch.Size(shape)
        self.made.append(node)
        return made

    def replace(self, old: Recorded, node: Node) -> Recorded:
        """`old` after an operation in place."""
        if old.is_shared:
            raise Declined("an operation in place may change the memory of another tensor too")
        self.shapes[node] = self.shapes[old.node]
        self.made.append(node)
        old.node = node
        return old

    def record(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        name = _attribute_of(function)
        if name is not None:
            return self._read(name, args[0])
        operation = OPERATIONS.get(function)
        if operation is None:
            raise self.declined(f"{_name_of(function)} is not supported")
        self._check_surroundings(args, kwargs)
        return operation(self, *args, **kwargs)

    def _read(self, name: str, tensor: Recorded) -> Any:
        if name in _ATTRIBUTES:
            self.is_sized |= name == "shape"
            with torch._C.DisableTorchFunctionSubclass():
                return getattr(tensor, name)
        raise self.declined(f"its forward asks for {name} of a tensor")

    def _check_surroundings(self, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise self.declined("a part of its forward runs without gradients")
        if _autocast_state(self._like.device.type) != self._autocast:
            raise self.declined("a part of its forward has an autocast mode of its own")
        with torch._C.DisableTorchFunctionSubclass():
            for value in (*args, *kwargs.values()):
                if isinstance(value, Recorded) and value.grad_fn is not None:
                    raise self.declined("its forward calls an autograd function of its own")

    def owners(self, tensor: Tensor, name: str) -> list[nn.Module]:
        """The modules that have `tensor` as their parameter or buffer `name`."""
        found = self._owners.get(id(tensor), ())
        owners = [module for module, known in found if known == name]
        if not owners:
            what = f"is no parameter named {name}" if found else "is computed"
            raise self.declined(f"a {name} that its forward uses {what}")
        return owners

    def declined(self, reason: str) -> Declined:
        """The sentence, with the name of the module inside that was running."""
        running = self.running()
        name = None if running is None else self._names().get(running)
        return Declined(f"{reason}, in {name} ({describe(running)})" if name else reason)

    def running(self) -> nn.Module | None:
        """The innermost module inside of the traced one whose method is running."""
        inside = self._names()
        frame = sys._getframe(1)
        while frame is not None:
            found = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
            if isinstance(found, nn.Module) and found in inside:
                return found
            frame = frame.f_back
        return None

    def _names(self) -> dict[nn.Module, str]:
        return {module: name for name, module in self.module.named_modules()}


def pair(value: Any) -> tuple[int, int]:
    """An argument that is a number or two, for rows and columns."""
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return values * 2 if len(values) == 1 else values


def _owners(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for inside in module.modules():
        for tensors in (inside._parameters, inside._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((inside, name))
    return found


def _autocast_state(device: str) -> tuple | None:
    if not torch.amp.is_autocast_available(device):
        return None
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _name_of(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", str(function))
    return getattr(owner, "__name__", name) if name == "__get__" else name


def _attribute_of(function: Callable) -> str | None:
    """The name of the attribute of tensors that the function reads; None for other functions."""
    if getattr(function, "__name__", None) != "__get__":
        return None
    return getattr(function.__self__, "__name__", "an attribute")
