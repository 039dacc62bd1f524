"""The program of a plan: the steps of a network as lists, since that is what an op can be given.

csrc/torch/program.cpp reads the lists that `encode` writes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from ..block.config import (
    NO_CLIP,
    SCALES,
    Activation,
    BlockConfig,
    Padding,
    curve_and_clip,
    output_size,
)
from ..block.fold import FoldedWeights

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stem:
    """The first convolution: 3x3, stride 2, then a clip or a curve.

    weight (3, 3, C_in, C_out), the columns of the window first; bias (C_out,).
    """

    in_channels: int
    out_channels: int
    padding: Padding
    weight: Tensor | None
    bias: Tensor | None
    clip: Activation

    def output_shape(self, shape: Shape) -> Shape:
        top, left, bottom, right = self.padding
        height = output_size(shape[1], 3, 2, top, bottom)
        return (self.out_channels, height, output_size(shape[2], 3, 2, left, right))


@dataclass(frozen=True)
class Block:
    """An inverted residual."""

    config: BlockConfig
    weights: FoldedWeights

    def output_shape(self, shape: Shape) -> Shape:
        return (self.config.out_channels, *self.config.output_hw(*shape[1:]))


@dataclass(frozen=True)
class Pool:
    """A 1x1 convolution, a clip or a curve, and the mean over all pixels.

    weight (C_in, C_out), None for the mean alone; bias (C_out,).
    """

    in_channels: int
    out_channels: int
    weight: Tensor | None
    bias: Tensor | None
    clip: Activation

    def output_shape(self, shape: Shape) -> Shape:
        return (self.out_channels,)


@dataclass(frozen=True)
class Pointwise:
    """A 1x1 convolution, and a clip or a curve. weight (C_in, C_out), bias (C_out,)."""

    in_channels: int
    out_channels: int
    weight: Tensor | None
    bias: Tensor | None
    clip: Activation

    def output_shape(self, shape: Shape) -> Shape:
        return (self.out_channels, *shape[1:])


@dataclass(frozen=True)
class Linear:
    """A fully connected layer, and a clip or a curve. weight (out, in), bias (out,)."""

    in_features: int
    out_features: int
    weight: Tensor | None
    bias: Tensor | None
    clip: Activation = NO_CLIP

    def output_shape(self, shape: Shape) -> Shape:
        return (self.out_features,)


Layer = Stem | Block | Pool | Linear | Pointwise


class Kind(IntEnum):
    """Kinds of steps: names and order as in `Kind` of csrc/torch/program.h."""

    STEM = 0
    BLOCK = 1
    POOL = 2
    LINEAR = 3
    POINTWISE = 4


_KINDS = {
    Stem: Kind.STEM,
    Block: Kind.BLOCK,
    Pool: Kind.POOL,
    Linear: Kind.LINEAR,
    Pointwise: Kind.POINTWISE,
}


@dataclass(frozen=True)
class Step:
    """A layer, and where its result goes.

    `offset` is where in the arena, in elements. `streams`: the next step takes the rows as they
    come, and the result is in no arena. `kept` is where in the arena a block with a squeeze-excite
    has its depthwise result, float32, until the gate is known.
    """

    layer: Layer
    offset: int = 0
    streams: bool = False
    kept: int = 0


@dataclass(frozen=True)
class Program:
    """Arguments of `run_plan` after x."""

    weights: list[Tensor | None]
    integers: list[int]
    bounds: list[float]

    @property
    def dtype(self) -> torch.dtype:
        """Of x and all weights; biases may be float32 whatever it is."""
        return next(w for w in self.weights if w is not None).dtype

    @property
    def device(self) -> torch.device:
        return next(w for w in self.weights if w is not None).device


def shapes(steps: Iterable[Step], shape: Shape) -> list[Shape]:
    """The shape of one image's result after every step; `shape` (C, H, W) is the image's."""
    found = []
    for step in steps:
        shape = step.layer.output_shape(shape)
        found.append(shape)
    return found


def encode(steps: Sequence[Step], shape: Shape, arena: int) -> Program:
    """The lists for an image of `shape` (C, H, W) and an arena of that many elements."""
    weights: list[Tensor | None] = []
    results = shapes(steps, shape)
    integers = [*shape, len(results[-1]), *results[-1], arena, len(steps)]
    bounds: list[float] = []

    def follow(*activations: Activation) -> None:
        for activation in activations:
            curve, clip = curve_and_clip(activation)
            integers.append(curve)
            bounds.extend(clip)

    for step, result in zip(steps, results, strict=True):
        layer = step.layer
        integers += [int(_KINDS[type(layer)]), step.offset, int(step.streams), step.kept]
        match layer:
            case Stem():
                integers += [*shape[1:], *result[1:], layer.in_channels, layer.out_channels]
                integers += layer.padding[:2]
                weights += [layer.weight, layer.bias]
                follow(layer.clip)
            case Block():
                c = layer.config
                integers += [*shape[1:], *result[1:]]
                integers += [c.in_channels, c.hidden_channels, c.out_channels]
                integers += [c.kernel_size, c.stride, c.dilation, *c.padding[:2]]
                integers += [int(c.residual), int(c.expansion), int(c.dense)]
                tensors = layer.weights.tensors()
                weights += tensors if c.expansion else tensors[2:]
                follow(*layer.weights.clips())
                gate = layer.weights.gate
                integers.append(int(gate is not None))
                if gate is not None:
                    integers += [gate.w_squeeze.shape[1], SCALES.index(gate.scale)]
                    weights += gate.tensors()
                    follow(gate.squeeze)
            case Pool():
                integers += [*shape[1:], layer.in_channels, layer.out_channels]
                integers.append(int(layer.weight is not None))
                weights += [] if layer.weight is None else [layer.weight, layer.bias]
                follow(layer.clip)
            case Pointwise():
                integers += [*shape[1:], layer.in_channels, layer.out_channels]
                weights += [layer.weight, layer.bias]
                follow(layer.clip)
            case Linear():
                integers += [layer.in_features, layer.out_features]
                weights += [layer.weight, layer.bias]
                follow(layer.clip)
        shape = result
    return Program(weights, integers, bounds)
