"""The layers that a forward can be read as: the words for what is not folded yet."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..block.config import NO_PADDING, Padding
from ..block.fold import BlockLayers, ConvNorm, GateLayers
from .declined import Declined


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """A convolution with its norm, activation and gate, and the arguments that it is given."""

    stage: ConvNorm
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]
    groups: int
    gate: GateLayers | None = None

    @property
    def is_pointwise(self) -> bool:
        sizes = (self.kernel_size, self.stride, self.padding, self.groups)
        return sizes == ((1, 1), (1, 1), NO_PADDING, 1)

    @property
    def is_depthwise(self) -> bool:
        hidden, of_each = self.stage.conv.weight.shape[:2]
        # One channel of 3x3 is a depthwise convolution too, of 1x1 a pointwise one.
        return self.groups == hidden and of_each == 1 and (hidden > 1 or not self.is_pointwise)


@dataclass(frozen=True, eq=False)
class AverageLayer:
    """The mean over all pixels.

    `is_flat`: it, or what the fully connected layers make of it, is (N, C) and not (N, C, 1, 1).
    """

    is_flat: bool = True


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A fully connected layer, or a 1x1 convolution of the mean over all pixels."""

    stage: ConvNorm


Layer = ConvLayer | BlockLayers | AverageLayer | LinearLayer


@dataclass(frozen=True)
class Reading:
    """What a forward computes: `layers` one after the other.

    `is_sized`: for inputs of the shape that it was read for, and otherwise for all.
    """

    layers: tuple[Layer, ...]
    is_sized: bool


def block_of(reading: Reading) -> BlockLayers:
    """The one block that a reading consists of.

    Raises:
        Declined: it has other layers.
    """
    if len(reading.layers) == 1 and isinstance(reading.layers[0], BlockLayers):
        return reading.layers[0]
    found = describe_layers(reading.layers) or "nothing"
    raise Declined(f"expected one inverted residual, found {found}")


def describe_layers(layers: Sequence[Layer]) -> str:
    """Layers for a sentence; empty where there are none."""
    return ", ".join(map(_describe, layers))


def _describe(layer: Layer) -> str:
    match layer:
        case BlockLayers():
            return f"a block {layer.config.name}"
        case ConvLayer():
            size = "x".join(map(str, layer.kernel_size))
            if layer.is_depthwise:
                return f"a {size} depthwise"
            groups = f" of {layer.groups} groups" if layer.groups > 1 else ""
            return f"a {size} convolution{groups}"
        case AverageLayer():
            return "an average over all pixels"
    return "a fully connected layer"
