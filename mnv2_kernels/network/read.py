"""Whole networks: which models are a chain of stem, blocks, last convolution and classifier.

The model's own forward is traced, so that what counts is what runs and not what the children are
called: torchvision's, timm's and this package's MobileNetV2 are all the same chain.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..block.config import Padding
from ..block.fold import ConvNorm
from ..recognizers.convolutions import is_identity
from ..recognizers.declined import Declined, describe
from ..recognizers.layers import assemble, check_untouched, has_hooks, read_stages

_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
_MEAN_DIMS = ({2, 3}, {-1, -2})


@dataclass(frozen=True)
class Convolution:
    """A convolution outside the blocks, and the zeros (top, left, bottom, right) around it.

    None stands for zeros that depend on the size of the input: TensorFlow's SAME. `modules` are
    those that it consists of, in the order they run.
    """

    name: str
    stage: ConvNorm
    padding: Padding | None
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Block:
    """An inverted residual block and its name in the model; `layers` is what was recognised: of
    blocks that are no module, `BlockLayers`.
    """

    name: str
    layers: Any


@dataclass(frozen=True)
class Pool:
    """The mean over all pixels; `keeps_dims` leaves (N, C, 1, 1)."""

    name: str
    keeps_dims: bool


@dataclass(frozen=True)
class Flatten:
    """(N, C, 1, 1) to (N, C)."""

    name: str


@dataclass(frozen=True)
class Classifier:
    """A fully connected layer and its name in the model."""

    name: str
    linear: nn.Linear


Layer = Convolution | Block | Pool | Flatten | Classifier


class Network(NamedTuple):
    """The layers in the order they run, and all modules called but those inside of blocks:
    what the chain rests on.
    """

    layers: list[Layer]
    called: list[nn.Module]


def read_network(
    model: nn.Module,
    recognize: Callable[[nn.Module], Any],
    may_call: Callable[[nn.Module], bool] = lambda module: True,
) -> Network:
    """The layers of a model; `recognize` tells what is a block, None for other modules.

    Modules that `may_call` does not allow are not called.

    Raises:
        Declined: the model is no such chain; the sentence names what does not fit.
    """
    blocks: dict[nn.Module, Any] = {}
    called = [model]
    thread = get_ident()

    class Tracer(fx.Tracer):
        # While fx traces, all modules of the process call these two.
        def getattr(self, name, value, cache):
            return super().getattr(name, value, cache) if get_ident() == thread else value

        def call_module(self, module, forward, args, kwargs):
            if get_ident() != thread:
                return forward(*args, **kwargs)
            if module not in blocks and not may_call(module):
                raise Declined(f"{describe(module)} may do more than compute")
            result = super().call_module(module, forward, args, kwargs)
            if module not in blocks:
                called.append(module)
            return result

        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            try:
                layers = recognize(module)
            except Declined as reason:
                raise Declined(f"{name}: {reason}") from None
            if layers is not None:
                blocks[module] = layers
                return True
            # Norms of other libraries are no modules of torch's.
            return (
                isinstance(module, nn.Conv2d | nn.BatchNorm2d)
                or getattr(module, "running_mean", None) is not None
                or super().is_leaf_module(module, name)
            )

    for name, module in model.named_modules():
        if has_hooks(module):
            raise Declined(f"{name or 'the model itself'} has hooks, which would not be called")
    if recognize(model) is not None:
        return Network([Block("", recognize(model))], called)
    try:
        graph = Tracer().trace(model)
    except Declined:
        raise
    except Exception as error:
        raise Declined(f"its forward cannot be traced: {error}") from error
    modules = dict(model.named_modules())
    layers: list[Layer] = []
    pending: list[tuple[str, nn.Module]] = []
    for node in _chain(graph):
        module = modules[node.target] if node.op == "call_module" else None
        if module is not None and module not in blocks and _is_plain(module):
            pending.append((node.target, module))
            continue
        layers += _convolutions(pending)
        pending = []
        if module in blocks:
            layers.append(Block(node.target, blocks[module]))
        elif (layer := _other(node, module)) is not None:
            layers.append(layer)
    return Network([*layers, *_convolutions(pending)], called)


def _chain(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes between input and output, each of which reads the one before and no other."""
    nodes = list(graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    before = inputs[0]
    for node in nodes:
        if node in inputs:
            if node is not before and node.users:
                raise Declined(f"its forward uses a further input, {node.name}")
            continue
        if node.all_input_nodes != [before] or len(before.users) != 1:
            raise Declined(f"{node.name} does not follow {before.name} alone: it is no chain")
        if node.op == "output":
            if node.args[0] is not before:
                raise Declined("its result is not a tensor")
            return
        yield node
        before = node


def _is_plain(module: nn.Module) -> bool:
    """What belongs to a convolution: itself, its norm, its clip, padding."""
    norm = getattr(module, "running_mean", None) is not None
    clip = isinstance(module, nn.ReLU | nn.Hardtanh)
    return norm or clip or isinstance(module, nn.Conv2d | nn.ConstantPad2d)


class _Stage:
    """Modules that run one after the other, with one convolution at most, and their names."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.modules: list[nn.Module] = []

    @property
    def conv(self) -> nn.Conv2d | None:
        return next((m for m in self.modules if isinstance(m, nn.Conv2d)), None)

    @property
    def name(self) -> str:
        """The convolution's, or the first module's."""
        return self.names[self.modules.index(self.conv) if self.conv is not None else 0]

    @property
    def is_depthwise(self) -> bool:
        conv = self.conv
        return conv is not None and conv.groups == conv.in_channels == conv.out_channels > 1

    @property
    def is_pointwise(self) -> bool:
        return self.conv is not None and self.conv.kernel_size == (1, 1) and self.conv.groups == 1


def _convolutions(plain: list[tuple[str, nn.Module]]) -> Iterator[Convolution | Block]:
    """The convolutions among plain modules; a depthwise one and its neighbours are a block."""
    stages: list[_Stage] = []
    for name, module in plain:
        begins = isinstance(module, nn.Conv2d | nn.ConstantPad2d)
        if not stages or begins and stages[-1].conv is not None:
            stages.append(_Stage())
        stages[-1].names.append(name)
        stages[-1].modules.append(module)
    while stages:
        count = _length_of_block(stages)
        taken, stages = stages[:count], stages[count:]
        modules = [module for stage in taken for module in stage.modules]
        try:
            for module in modules:
                check_untouched(module)
            if count > 1:
                yield Block(taken[0].name, assemble(modules, residual=False))
                continue
            found, paddings = read_stages(modules, by_size=True)
        except Declined as reason:
            raise Declined(f"{taken[0].names[0]}: {reason}") from None
        yield Convolution(taken[0].name, found[0], paddings[0], tuple(modules))


def _length_of_block(stages: list[_Stage]) -> int:
    """How many stages at the front are one block without residual; 1 where they are none."""
    begins = 1 if stages[0].is_pointwise else 0
    inside = stages[begins : begins + 2]
    if len(inside) == 2 and inside[0].is_depthwise and inside[1].is_pointwise:
        return begins + 2
    return 1


def _other(node: fx.Node, module: nn.Module | None) -> Layer | None:
    """A pool, a flattening, a classifier; None for what does nothing; declines all else."""
    if module is not None:
        check_untouched(module)
        if is_identity(module) or isinstance(module, _DROPOUTS):
            return None
        if isinstance(module, nn.Linear):
            return Classifier(node.target, module)
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1]):
            return Pool(node.name, keeps_dims=True)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return Flatten(node.name)
        raise Declined(f"{node.target} is {describe(module)}, which a plan has no step for")
    arguments = (*node.args[1:], *node.kwargs.values())
    if node.target in (F.dropout, F.dropout2d) and node.kwargs.get("training") is False:
        return None
    if node.target is F.adaptive_avg_pool2d and arguments in ((1,), ((1, 1),), ([1, 1],)):
        return Pool(node.name, keeps_dims=True)
    if node.target in (torch.flatten, "flatten") and arguments in ((1,), (1, -1)):
        return Flatten(node.name)
    if node.target in (torch.mean, "mean"):
        names = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
        keeps = names.get("keepdim", names.get("keepdims", False))
        dims = names.get("dim")
        if isinstance(dims, tuple | list) and set(dims) in _MEAN_DIMS:
            return Pool(node.name, keeps_dims=bool(keeps))
    operation = getattr(node.target, "__name__", node.target)
    raise Declined(f"{operation} is an operation that a plan has no step for")
