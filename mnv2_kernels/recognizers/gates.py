"""Squeeze-excite: a value times what two layers make of the means of all its channels."""

from ..block.fold import ConvNorm, GateLayers
from .activations import put
from .trace import (
    Average,
    Clamp,
    Convolution,
    Curve,
    Gate,
    Linear,
    Node,
    Norm,
    Recorded,
    Scale,
    Trace,
)


class _Way:
    """From a value back to what it was computed from, step by step."""

    def __init__(self, node: Node):
        self.node = node
        self.passed: list[Node] = []

    def back(self) -> Node:
        """One step, and the value that was there."""
        self.passed.append(self.node)
        self.node = self.node.inputs[0]
        return self.passed[-1]

    def found(self, *kinds: type[Node]) -> Node | None:
        """The value here if it is of one of these kinds, and a step back from there.

        Other shapes of a value are passed.
        """
        while self.node.kind in ("same", "expanded"):
            self.back()
        return self.back() if isinstance(self.node, kinds) else None


def gated(trace: Trace, x: Recorded, other: Recorded, in_place: bool) -> Recorded:
    """The product of a value and its squeeze-excite.

    Raises:
        Declined: it is another product.
    """
    if _Way(other.node).found(Scale) is None:
        if _Way(x.node).found(Scale) is None:
            raise trace.declined("it multiplies two results, of which none is a gate")
        if in_place:
            raise trace.declined("a gate is changed in place")
        x, other = other, x
    if len(x.sizes) != 4 or other.sizes not in (x.sizes, (*x.sizes[:2], 1, 1)):
        raise trace.declined(
            f"a gate must have a number for each channel of {tuple(x.sizes)}, got"
            f" {tuple(other.sizes)}"
        )
    return put(trace, x, _gate(trace, x.node, other.node), in_place)


def _gate(trace: Trace, value: Node, by: Node) -> Gate:
    way = _Way(by)
    scale, excite, squeeze = way.found(Scale), _layer(way), _layer(way, Clamp, Curve)
    if excite is None or squeeze is None:
        raise trace.declined(
            "a gate must be the sigmoid of two fully connected layers or 1x1 convolutions, got"
            f" {'none' if excite is None else 'one'}"
        )
    if way.found(Average) is None:
        raise trace.declined(
            f"a gate must begin with means over all pixels, found {way.node.kind} in their place"
        )
    # The value may be a copy of what is averaged, or the other way round.
    copies = [value]
    while copies[-1].kind == "same":
        copies.append(copies[-1].inputs[0])
    while way.node.kind == "same" and way.node not in copies:
        way.back()
    if way.node not in copies:
        raise trace.declined("a gate must multiply the value that was averaged, got another one")
    layers = GateLayers(squeeze, excite, scale.scale)
    return Gate("gate", (value,), trace.call, layers, parts=tuple(way.passed))


def _layer(way: _Way, *activations: type[Node]) -> ConvNorm | None:
    """A fully connected layer or a 1x1 convolution with the norm and the activation after it."""
    activation, norm = way.found(*activations), way.found(Norm)
    match way.found(Linear, Convolution):
        case Linear(linear=conv):
            pass
        case Convolution(conv=conv) as node if node.is_pointwise:
            pass
        case _:
            return None
    after = {} if activation is None else {"clip": activation.clip}
    return ConvNorm(conv, None if norm is None else norm.norm, **after)
