"""The layers of a network, from the operations that its forward does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..block.config import NO_CLIP, BlockConfig, Padding
from ..block.fold import BlockLayers, ConvNorm
from .checks import check_untouched, has_hooks, left_as_it_was
from .declined import Declined, describe
from .operations import ChannelsDiffer
from .trace import Clamp, Convolution, Linear, Node, Norm, Pad, Trace

_NO_PADDING: Padding = (0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """A convolution with its norm and its clip, and the arguments that its forward gives it."""

    stage: ConvNorm
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]
    groups: int

    @property
    def is_pointwise(self) -> bool:
        sizes = (self.kernel_size, self.stride, self.padding, self.groups)
        return sizes == ((1, 1), (1, 1), _NO_PADDING, 1)

    @property
    def is_depthwise(self) -> bool:
        hidden = self.stage.conv.weight.shape
        return self.groups == hidden[0] > 1 == hidden[1]


@dataclass(frozen=True, eq=False)
class AverageLayer:
    """The mean over all pixels."""


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """The classifier."""

    linear: nn.Module


Layer = ConvLayer | BlockLayers | AverageLayer | LinearLayer


@dataclass(frozen=True)
class Reading:
    """What a forward computes: `layers` one after the other.

    `is_sized`: for inputs of the shape that it was read for, and otherwise for all.
    """

    layers: tuple[Layer, ...]
    is_sized: bool


def read(
    module: nn.Module,
    shape: Sequence[int],
    calls: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> Reading:
    """What the forward of a module computes for x of `shape` (N, C, H, W), in the modes it has now.

    Args:
        module: whose parameters and buffers are used.
        calls: functions that run one after the other in place of the forward.

    Raises:
        Declined: the forward is something else than a chain of layers; the sentence says what.
    """
    calls = [module.forward] if calls is None else calls
    trace, error = follow(module, shape, calls)
    if error is not None:
        raise error
    return Reading(tuple(layers_of(trace, len(calls))), trace.is_sized)


def follow(
    module: nn.Module, shape: Sequence[int], calls: Sequence[Callable[[Tensor], Tensor]]
) -> tuple[Trace, Declined | None]:
    """What the calls do, up to one that is declined; `trace.outputs` has the results so far."""
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is None:
        raise Declined("it has no parameters")
    trace = Trace(module)
    error = None
    try:
        with torch.inference_mode(False), torch.enable_grad(), left_as_it_was(module):
            x = first = trace.begin(shape, like)
            for trace.call, call in enumerate(calls):
                before = len(trace.made)
                try:
                    _check_call(module, call)
                    x = call(x)
                    _check_result(trace, x, first)
                except Exception:
                    del trace.made[before:]
                    raise
                trace.outputs.append(x.node)
    except Declined as reason:
        error = reason
    except Exception as problem:
        error = Declined(f"its forward cannot be followed: {problem}")
    return trace, error


def _check_call(module: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
    """Decline what may not be called, or would be missed if it was not."""
    is_module = isinstance(call, nn.Module)
    called = call if is_module else module
    if is_module and has_hooks(call):
        raise Declined(f"{describe(call)} has hooks, which would not be called")
    check_untouched(called)
    for inner in called.modules():
        # Before it counts its batches.
        if isinstance(inner, nn.modules.batchnorm._BatchNorm) and inner.training:
            raise Declined(
                "batch norm is in training mode and needs the statistics of whole tensors"
            )


def _check_result(trace: Trace, y: object, first: Tensor) -> None:
    if not isinstance(y, Tensor) or type(y) is not type(first):
        raise Declined(f"its result is a {type(y).__name__} that was not computed from its input")
    with torch._C.DisableTorchFunctionSubclass():
        if y.grad_fn is not None:
            raise Declined("its forward calls an autograd function of its own")
    if first.node.kind != "input":
        raise Declined("its forward changes its input in place")


@dataclass
class _Stage:
    """A layer while it is read; `ends` are the value after it and copies of that."""

    layer: ConvLayer | AverageLayer | LinearLayer
    ends: set[Node]
    first_call: int
    last_call: int
    is_summed: bool = False


class Span(NamedTuple):
    """A layer, and in which calls it begins and ends."""

    layer: Layer
    first_call: int
    last_call: int


def layers_of(trace: Trace, calls: int) -> list[Layer]:
    """The layers that the first `calls` calls consist of.

    Raises:
        Declined: they are no chain of layers.
    """
    return [span.layer for span in spans_of(trace, calls)]


def spans_of(trace: Trace, calls: int) -> list[Span]:
    """As `layers_of`, with the calls that each layer is in."""
    made = [node for node in trace.made if node.call < calls]
    stages, sums = _stages(made, trace.outputs[calls - 1])
    spans: list[Span] = []
    at = 0
    while at < len(stages):
        length, residual = _length_of_block(stages, at, sums)
        inside = stages[at : at + length]
        layers = [stage.layer for stage in inside]
        layer = layers[0] if length == 1 else _block(layers, residual)
        spans.append(Span(layer, inside[0].first_call, inside[-1].last_call))
        at += length
    return spans


def _stages(made: list[Node], result: Node) -> tuple[list[_Stage], dict[int, int]]:
    """Convolutions with their norms and clips, and the sums: after which stage, from where on."""
    stages: list[_Stage] = []
    sums: list[tuple[int, Node]] = []
    value = made[0]
    starts = {value}
    padding: Padding | None = None
    padded_in = 0
    for node in made[1:]:
        if node.kind == "scaled":
            continue
        if value not in node.inputs:
            raise Declined("its forward is no chain: a result is used twice, or not at all")
        match node:
            case Pad():
                padded_in = node.call if padding is None else padded_in
                padding = _added(padding, node.padding)
            case Convolution():
                first = node.call if padding is None else padded_in
                stages.append(_Stage(_conv_layer(node, padding), set(), first, node.call))
                padding = None
            case _ if padding is not None and node.kind != "same":
                raise Declined(f"a {node.kind} stands between zero padding and a convolution")
            case Norm() | Clamp():
                if not stages:
                    raise Declined(f"a {node.kind} stands before the first convolution")
                _append(stages[-1], node)
            case Linear():
                stages.append(_Stage(LinearLayer(node.linear), set(), node.call, node.call))
            case Node(kind="average"):
                stages.append(_Stage(AverageLayer(), set(), node.call, node.call))
            case Node(kind="add"):
                first, second = node.inputs
                source = second if first is value else first
                if not stages or source is value:
                    raise Declined("it adds a result to itself")
                sums.append((len(stages) - 1, source))
                stages[-1].is_summed = True
        ends = stages[-1].ends if stages else starts
        if node.kind not in ("same", "pad"):
            ends.clear()
        if node.kind != "pad":
            ends.add(node)
            if stages:
                stages[-1].last_call = node.call
        value = node
    if padding is not None:
        raise Declined("the zero padding after the last convolution cannot be fused")
    if value is not result:
        raise Declined("its result is not the last value that it computes")
    before = {end: i for i, ends in enumerate((starts, *(s.ends for s in stages))) for end in ends}
    spans = {}
    for last, source in sums:
        if source not in before or last in spans:
            raise Declined("it adds something else than the input of a block to its result")
        spans[last] = before[source]
    return stages, spans


def _conv_layer(node: Convolution, padding: Padding | None) -> ConvLayer:
    return ConvLayer(
        ConvNorm(node.conv, None),
        node.kernel_size,
        node.stride,
        _added(padding, node.padding),
        node.dilation,
        node.groups,
    )


def _append(stage: _Stage, node: Norm | Clamp) -> None:
    """Add a norm or a clip to the convolution that it follows."""
    layer = stage.layer
    if not isinstance(layer, ConvLayer) or stage.is_summed:
        raise Declined(f"a {node.kind} follows something else than a convolution")
    conv_norm = layer.stage
    if conv_norm.clip != NO_CLIP:
        raise Declined(f"a {node.kind} follows a clip")
    if isinstance(node, Norm):
        if conv_norm.norm is not None:
            raise Declined("a batch norm follows another one")
        conv_norm = ConvNorm(conv_norm.conv, node.norm)
    else:
        conv_norm = replace(conv_norm, clip=node.clip)
    stage.layer = replace(layer, stage=conv_norm)


def _added(first: Padding | None, second: Padding) -> Padding:
    return second if first is None else tuple(a + b for a, b in zip(first, second, strict=True))


def _length_of_block(stages: list[_Stage], at: int, sums: dict[int, int]) -> tuple[int, bool]:
    """How many stages from `at` on are one block, and whether its input is added to its result.

    A single stage is no block.
    """
    for length in (3, 2):
        inside = stages[at : at + length]
        last = at + length - 1
        # A sum that begins or ends inside belongs to another block.
        crosses = any(
            at < begin <= last or (at <= end <= last and (begin, end) != (at, last))
            for end, begin in sums.items()
        )
        if len(inside) == length and not crosses and _is_block([s.layer for s in inside]):
            return length, sums.get(last) == at
    if at in sums:
        raise Declined("it adds its input to the result of something else than a block")
    return 1, False


def _is_block(layers: list[Layer]) -> bool:
    """Whether layers are a depthwise convolution between 1x1 ones; the first may be missing."""
    if not all(isinstance(layer, ConvLayer) for layer in layers):
        return False
    *expand, depthwise, project = layers
    if not (depthwise.is_depthwise and project.is_pointwise):
        return False
    return all(layer.is_pointwise and not layer.is_depthwise for layer in expand)


def _block(layers: list[ConvLayer], residual: bool) -> BlockLayers:
    *expand, depthwise, project = layers
    for name, allowed in (("kernel_size", (3, 5)), ("stride", (1, 2)), ("dilation", (1, 2))):
        value = getattr(depthwise, name)
        if value not in [(a, a) for a in allowed]:
            raise Declined(f"the depthwise must have a {name} in {allowed}, got {value}")
    extent = depthwise.dilation[0] * (depthwise.kernel_size[0] - 1)
    if not all(0 <= p <= extent for p in depthwise.padding):
        raise Declined(
            f"the depthwise's padding must be from 0 to {extent}, got {depthwise.padding}"
        )
    if residual and depthwise.stride != (1, 1):
        raise Declined("it adds its input to a result at stride 2")
    hidden = depthwise.stage.conv.weight.shape[0]
    config = BlockConfig(
        in_channels=expand[0].stage.conv.weight.shape[1] if expand else hidden,
        hidden_channels=hidden,
        out_channels=project.stage.conv.weight.shape[0],
        stride=depthwise.stride[0],
        expansion=bool(expand),
        kernel_size=depthwise.kernel_size[0],
        dilation=depthwise.dilation[0],
        padding=depthwise.padding,
        residual=residual,
    )
    return BlockLayers(
        expand=expand[0].stage if expand else None,
        depthwise=depthwise.stage,
        project=project.stage,
        config=config,
    )


# What a module is read for where nothing says what it will be called with.
_USUAL_SIZE = (224, 224)


def read_unknown(module: nn.Module) -> Reading:
    """`read` for images of a usual size, with as many channels as the first convolution takes.

    Raises:
        Declined: as `read`.
    """
    try:
        return read(module, (1, guess_channels([module]), *_USUAL_SIZE))
    except ChannelsDiffer as reason:
        return read(module, (1, reason.expected, *_USUAL_SIZE))


def guess_channels(modules: Sequence[nn.Module]) -> int:
    """How many channels the first convolution takes, if it is the first that runs."""
    weights = (p for module in modules for p in module.parameters() if p.dim() == 4)
    weight = next(weights, None)
    if weight is None:
        return 3
    return weight.shape[0] if weight.shape[1] == 1 else weight.shape[1]


def block_of(reading: Reading) -> BlockLayers:
    """The one block that a reading consists of.

    Raises:
        Declined: it has other layers.
    """
    if len(reading.layers) == 1 and isinstance(reading.layers[0], BlockLayers):
        return reading.layers[0]
    found = ", ".join(map(_describe, reading.layers)) or "nothing"
    raise Declined(f"expected one inverted residual, found {found}")


def _describe(layer: Layer) -> str:
    match layer:
        case BlockLayers():
            return f"a block {layer.config.name}"
        case ConvLayer():
            size = "x".join(map(str, layer.kernel_size))
            kind = "depthwise" if layer.is_depthwise else "convolution"
            return f"a {size} {kind}"
        case AverageLayer():
            return "an average over all pixels"
    return "a fully connected layer"


def has_depthwise(module: nn.Module) -> bool:
    """Whether a weight inside is that of a depthwise convolution."""
    return any(map(is_depthwise_weight, module.parameters()))


def is_depthwise_weight(weight: Tensor) -> bool:
    """(C, 1, k, k) with k > 1 and C > 1."""
    return (
        weight.dim() == 4 and weight.shape[1] == 1 < weight.shape[0] and max(weight.shape[2:]) > 1
    )
