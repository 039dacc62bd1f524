"""From the operations of a trace to layers: convolutions with what follows them, then blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..block.config import MAX_EXTENT, NO_CLIP, NO_PADDING, BlockConfig, Padding
from ..block.fold import BlockLayers, ConvNorm, LeadConv
from .declined import Declined
from .layers import AverageLayer, ConvLayer, Layer, LinearLayer, describe_layers
from .trace import (
    Average,
    Clamp,
    Convolution,
    Curve,
    Gate,
    Linear,
    Node,
    Norm,
    Pad,
    Trace,
    Unfinished,
)

_GATE = "a gate must come between the depthwise and the projection"


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
    parts = {part for node in made for part in node.parts}
    result = trace.outputs[calls - 1]
    stages, sums = _stages([node for node in made if node not in parts], result)
    spans: list[Span] = []
    at = 0
    while at < len(stages):
        before = spans[-1].layer if spans else None
        # Layers of one pixel are fully connected ones.
        lengths = () if isinstance(before, AverageLayer | LinearLayer) else (4, 3, 2)
        length, residual = _length_of_block(stages, at, sums, lengths)
        inside = stages[at : at + length]
        layers = [stage.layer for stage in inside]
        layer = _block(layers, residual) if length > 1 else _single(layers[0], before)
        spans.append(Span(layer, inside[0].first_call, inside[-1].last_call))
        at += length
    return _with_flatness(spans, len(trace.shapes[result]) == 2)


def _single(layer: Layer, before: Layer | None) -> Layer:
    """A layer outside of blocks; a 1x1 convolution of one pixel is a fully connected layer."""
    if not isinstance(layer, ConvLayer):
        return layer
    if layer.gate is not None:
        raise Declined(f"{_GATE}, got no projection after it")
    is_head = layer.is_pointwise and isinstance(before, AverageLayer | LinearLayer)
    return LinearLayer(layer.stage) if is_head else layer


def _with_flatness(spans: list[Span], is_flat: bool) -> list[Span]:
    """With what is known of the last average, if only fully connected layers follow it."""
    for i in reversed(range(len(spans))):
        if isinstance(spans[i].layer, AverageLayer):
            spans[i] = spans[i]._replace(layer=AverageLayer(is_flat))
        if not isinstance(spans[i].layer, LinearLayer):
            break
    return spans


class _Chain:
    """Layers that run one after the other, and the sums: after which stage, from where on."""

    def __init__(self, start: Node):
        self.stages: list[_Stage] = []
        self.sums: list[tuple[int, Node]] = []
        self.value = start
        self.starts = {start}
        self.padding: Padding | None = None
        self.padded_in = 0

    def append(self, node: Node) -> None:
        """Go on by one operation."""
        if isinstance(node, Unfinished):
            raise node.reason
        if self.value not in node.inputs:
            raise Declined("its forward is no chain: a result is used twice, or not at all")
        if isinstance(node, Pad):
            self.padded_in = node.call if self.padding is None else self.padded_in
            self.padding = _added(self.padding, node.padding)
        else:
            self._append_unpadded(node)
        self.value = node

    def _append_unpadded(self, node: Node) -> None:
        if self.padding is not None and not (isinstance(node, Convolution) or node.kind == "same"):
            raise Declined(f"a {node.kind} comes between zero padding and a convolution")
        match node:
            case Convolution():
                first = node.call if self.padding is None else self.padded_in
                self._begin(_conv_layer(node, self.padding), first)
                self.padding = None
            case Linear():
                self._begin(LinearLayer(ConvNorm(node.linear, None)), node.call)
            case Average():
                self._begin(AverageLayer(), node.call)
            case Norm() | Clamp() | Curve() | Gate():
                if not self.stages:
                    raise Declined(f"a {node.kind} comes before the first convolution")
                _append(self.stages[-1], node)
            case Node(kind="add"):
                self._add(*node.inputs)
        ends = self.stages[-1].ends if self.stages else self.starts
        if node.kind != "same":
            ends.clear()
        ends.add(node)
        if self.stages:
            self.stages[-1].last_call = node.call

    def _begin(self, layer: Layer, first_call: int) -> None:
        self.stages.append(_Stage(layer, set(), first_call, first_call))

    def _add(self, first: Node, second: Node) -> None:
        source = second if first is self.value else first
        if not self.stages or source is self.value:
            raise Declined("it adds a result to itself")
        self.sums.append((len(self.stages) - 1, source))
        self.stages[-1].is_summed = True


def _stages(made: list[Node], result: Node) -> tuple[list[_Stage], dict[int, int]]:
    """The layers of a forward, and which sums go around which of them: last stage -> first."""
    chain = _Chain(made[0])
    for node in made[1:]:
        if node.kind != "scaled":
            chain.append(node)
    if chain.padding is not None:
        raise Declined("the zero padding after the last convolution cannot be fused")
    if chain.value is not result:
        raise Declined("its result is not the last value that it computes")
    every = (chain.starts, *(stage.ends for stage in chain.stages))
    before = {end: i for i, ends in enumerate(every) for end in ends}
    spans = {}
    for last, source in chain.sums:
        if source not in before or last in spans:
            raise Declined("it adds something else than the input of a block to its result")
        spans[last] = before[source]
    return chain.stages, spans


def _conv_layer(node: Convolution, padding: Padding | None) -> ConvLayer:
    return ConvLayer(
        ConvNorm(node.conv, None),
        node.kernel_size,
        node.stride,
        _added(padding, node.padding),
        node.dilation,
        node.groups,
    )


def _append(stage: _Stage, node: Norm | Clamp | Curve | Gate) -> None:
    """Add what follows a layer to it: a norm, an activation or a gate."""
    layer = stage.layer
    if isinstance(layer, AverageLayer) or stage.is_summed:
        raise Declined(f"a {node.kind} follows something else than a convolution")
    if isinstance(node, Gate):
        stage.layer = _gated(layer, node)
        return
    conv_norm = layer.stage
    is_norm = isinstance(node, Norm)
    if isinstance(layer, ConvLayer) and layer.gate is not None:
        later = "norm" if is_norm else "activation"
        raise Declined(f"{_GATE}, got it before the {later} of the depthwise")
    if conv_norm.clip != NO_CLIP:
        before = conv_norm.clip if isinstance(conv_norm.clip, str) else "clip"
        raise Declined(f"a {node.kind} follows a {before}")
    if is_norm and conv_norm.norm is not None:
        raise Declined("a batch norm follows another one")
    change = {"norm": node.norm} if is_norm else {"clip": node.clip}
    stage.layer = replace(layer, stage=replace(conv_norm, **change))


def _gated(layer: ConvLayer | LinearLayer, node: Gate) -> ConvLayer:
    if not isinstance(layer, ConvLayer) or not layer.is_depthwise:
        raise Declined(f"{_GATE}, got it after {describe_layers([layer])}")
    if layer.gate is not None:
        raise Declined("a gate follows another one")
    return replace(layer, gate=node.gate)


def _added(first: Padding | None, second: Padding) -> Padding:
    return second if first is None else tuple(a + b for a, b in zip(first, second, strict=True))


def _length_of_block(
    stages: list[_Stage], at: int, sums: dict[int, int], lengths: Sequence[int]
) -> tuple[int, bool]:
    """How many stages from `at` on are one block, and whether its input is added to its result.

    A single stage is no block.
    """
    for length in lengths:
        inside = stages[at : at + length]
        last = at + length - 1
        # A sum that begins or ends inside belongs to another block.
        crosses = any(
            at < begin <= last or (at <= end <= last and (begin, end) != (at, last))
            for end, begin in sums.items()
        )
        if len(inside) == length and not crosses and _parts_of([s.layer for s in inside]):
            return length, sums.get(last) == at
    if at in sums:
        inside = describe_layers([stage.layer for stage in stages[sums[at] : at + 1]])
        raise Declined(f"its shortcut must go around one block, got {inside}")
    return 1, False


class _Parts(NamedTuple):
    """The layers of a block; `middle` is its depthwise, or a dense convolution."""

    lead: ConvLayer | None
    expand: ConvLayer | None
    middle: ConvLayer
    project: ConvLayer


# With fewer channels a dense convolution is short work: the first layer of a network is one.
_LEAST_DENSE_CHANNELS = 8


def _parts_of(layers: list[Layer]) -> _Parts | None:
    """The layers as a block, if they are one."""
    if not all(isinstance(layer, ConvLayer) for layer in layers):
        return None
    *before, middle, project = layers
    if not project.is_pointwise:
        return None
    expand = None
    if middle.is_depthwise:
        expand = before.pop() if before else None
        if expand is not None and not replace(expand, padding=NO_PADDING).is_pointwise:
            return None
    elif not _is_dense(middle, project):
        return None
    if not before:
        return _Parts(None, expand, middle, project)
    is_led = len(before) == 1 and _is_lead(before[0], expand or middle, project)
    return _Parts(before[0], expand, middle, project) if is_led else None


def _is_dense(layer: ConvLayer, project: ConvLayer) -> bool:
    """Whether a convolution expands, for the projection to narrow: then it is a part of a block."""
    has_activations = layer.stage.clip != NO_CLIP and project.stage.clip == NO_CLIP
    sizes = (layer.kernel_size, layer.stride, layer.dilation, layer.groups)
    known = [((k, k), (s, s), (1, 1), 1) for k in (1, 3, 5) for s in (1, 2)]
    # A 1x1 convolution pads what the projection would see.
    fits = max(layer.padding) < layer.kernel_size[0] and layer.gate is None
    is_wide = layer.stage.conv.weight.shape[1] >= _LEAST_DENSE_CHANNELS
    return sizes in known and fits and has_activations and is_wide and _widens(layer, project)


def _widens(layer: ConvLayer, project: ConvLayer) -> bool:
    """Whether what is between two convolutions is wider than before and after them."""
    hidden, in_channels = layer.stage.conv.weight.shape[:2]
    return hidden > max(in_channels, len(project.stage.conv.weight))


def _is_lead(layer: ConvLayer, after: ConvLayer, project: ConvLayer) -> bool:
    """Whether a depthwise belongs to the block after it, not to another one before."""
    is_linear = layer.stage.clip == NO_CLIP and project.stage.clip == NO_CLIP
    return (
        layer.is_depthwise
        and layer.gate is None
        and is_linear
        and after.stage.clip != NO_CLIP
        and _widens(after, project)
        and (after.kernel_size != (1, 1) or after.padding == NO_PADDING)
    )


def _block(layers: list[ConvLayer], residual: bool) -> BlockLayers:
    lead, expand, middle, project = _parts_of(layers)
    dense = not middle.is_depthwise
    if not dense:
        _check_depthwise(middle)
    if residual and (middle.stride != (1, 1) or (lead is not None and lead.stride != (1, 1))):
        raise Declined("it adds its input to a result at stride 2")
    hidden, in_channels = middle.stage.conv.weight.shape[:2]
    if expand is not None:
        in_channels = expand.stage.conv.weight.shape[1]
    elif not dense:
        in_channels = hidden
    # A border of zeros is none any more after the expansion.
    pads = expand is not None and expand.padding != NO_PADDING
    adds = residual and (pads or lead is not None)
    config = BlockConfig(
        in_channels=in_channels,
        hidden_channels=hidden,
        out_channels=project.stage.conv.weight.shape[0],
        stride=middle.stride[0],
        expansion=expand is not None,
        kernel_size=middle.kernel_size[0],
        dilation=middle.dilation[0],
        padding=middle.padding,
        residual=residual and not adds,
        squeeze_channels=len(middle.gate.squeeze.conv.weight) if middle.gate else 0,
        dense=dense,
    )
    return BlockLayers(
        expand=expand.stage if expand else None,
        depthwise=middle.stage,
        project=project.stage,
        config=config,
        pads=expand.padding if pads else NO_PADDING,
        adds=adds,
        gate=middle.gate,
        lead=_lead_of(lead) if lead else None,
    )


def _lead_of(layer: ConvLayer) -> LeadConv:
    return LeadConv(layer.stage, layer.kernel_size, layer.stride, layer.padding, layer.dilation)


def _check_depthwise(layer: ConvLayer) -> None:
    for name, allowed in (("kernel_size", (3, 5, 7)), ("stride", (1, 2))):
        value = getattr(layer, name)
        if value not in [(a, a) for a in allowed]:
            raise Declined(f"the depthwise must have a {name} in {allowed}, got {value}")
    rows, cols = layer.dilation
    extent = rows * (layer.kernel_size[0] - 1)
    if rows != cols or extent > MAX_EXTENT:
        most = MAX_EXTENT // (layer.kernel_size[0] - 1)
        raise Declined(
            f"the depthwise must have a dilation of at most {most} rows and as many columns,"
            f" got {layer.dilation}"
        )
    if not all(0 <= p <= extent for p in layer.padding):
        raise Declined(f"the depthwise's padding must be from 0 to {extent}, got {layer.padding}")
