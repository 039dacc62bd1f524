"""From the operations of a trace to layers: convolutions with what follows them, then blocks."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..block.config import NO_CLIP, NO_PADDING, BlockConfig, Padding
from ..block.fold import BlockLayers, ConvNorm
from .declined import Declined
from .layers import AverageLayer, ConvLayer, Layer, LinearLayer, describe_layers
from .trace import Clamp, Convolution, Linear, Node, Norm, Pad, Trace


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
    result = trace.outputs[calls - 1]
    stages, sums = _stages(made, result)
    if stages and isinstance(stages[-1].layer, AverageLayer):
        stages[-1].layer = AverageLayer(is_flat=len(trace.shapes[result]) == 2)
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
                raise Declined(f"a {node.kind} comes between zero padding and a convolution")
            case Norm() | Clamp():
                if not stages:
                    raise Declined(f"a {node.kind} comes before the first convolution")
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
        inside = describe_layers([stage.layer for stage in stages[sums[at] : at + 1]])
        raise Declined(f"its shortcut must go around one block, got {inside}")
    return 1, False


def _is_block(layers: list[Layer]) -> bool:
    """Whether layers are a depthwise convolution between 1x1 ones; the first may be missing."""
    if not all(isinstance(layer, ConvLayer) for layer in layers):
        return False
    *expand, depthwise, project = layers
    if not (depthwise.is_depthwise and project.is_pointwise):
        return False
    return all(replace(layer, padding=NO_PADDING).is_pointwise for layer in expand)


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
    # A border of zeros is none any more after the expansion.
    pads = bool(expand) and expand[0].padding != NO_PADDING
    config = BlockConfig(
        in_channels=expand[0].stage.conv.weight.shape[1] if expand else hidden,
        hidden_channels=hidden,
        out_channels=project.stage.conv.weight.shape[0],
        stride=depthwise.stride[0],
        expansion=bool(expand),
        kernel_size=depthwise.kernel_size[0],
        dilation=depthwise.dilation[0],
        padding=depthwise.padding,
        residual=residual and not pads,
    )
    return BlockLayers(
        expand=expand[0].stage if expand else None,
        depthwise=depthwise.stage,
        project=project.stage,
        config=config,
        pads=expand[0].padding if pads else NO_PADDING,
        adds=residual and pads,
    )
