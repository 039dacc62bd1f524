"""Whole networks: which models are a chain of stem, blocks, last convolution and classifier.

The model's own forward is traced, so that what counts is what runs and not what the children are
called: torchvision's, timm's and this package's MobileNetV2 are all the same chain.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..block import Padding
from ..fold import BlockLayers, ConvNorm
from .convolutions import is_identity
from .declined import Declined, describe
from .layers import check_untouched, has_hooks, read_stages

_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
_MEAN_DIMS = ({2, 3}, {-1, -2})


@dataclass(frozen=True)
class Convolution:
    """A convolution outside the blocks, and the zeros (top, left, bottom, right) around it."""

    name: str
    stage: ConvNorm
    padding: Padding


@dataclass(frozen=True)
class Block:
    """An inverted residual block and its name in the model."""

    name: str
    layers: BlockLayers


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


def read_network(model: nn.Module, recognize) -> list[Layer]:
    """The layers of a model in the order they run; `recognize` tells blocks (`recognizers`).

    Raises:
        Declined: the model is no such chain; the sentence names what does not fit.
    """
    blocks: dict[nn.Module, BlockLayers] = {}

    class Tracer(fx.Tracer):
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
        return [Block("", recognize(model))]
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
            begins = isinstance(module, nn.Conv2d | nn.ConstantPad2d)
            if begins and any(isinstance(m, nn.Conv2d) for _, m in pending):
                layers += _convolution(pending)
                pending = []
            pending.append((node.target, module))
            continue
        layers += _convolution(pending)
        pending = []
        if module in blocks:
            layers.append(Block(node.target, blocks[module]))
        elif (layer := _other(node, module)) is not None:
            layers.append(layer)
    return layers + list(_convolution(pending))


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


def _convolution(pending: list[tuple[str, nn.Module]]) -> Iterator[Convolution]:
    if not pending:
        return
    first, module = pending[0]
    try:
        stages, paddings = read_stages(module for _, module in pending)
    except Declined as reason:
        raise Declined(f"{first}: {reason}") from None
    if len(stages) != 1:
        raise Declined(f"{first}: {describe(module)} stands where a convolution was expected")
    name = next(n for n, module in pending if isinstance(module, nn.Conv2d))
    yield Convolution(name, stages[0], paddings[0])


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
