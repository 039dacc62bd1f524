"""What a plan is made of: a model that is a chain of layers, and the size of its images."""

from collections.abc import Sequence
from operator import index
from typing import SupportsIndex

from torch import Tensor, nn

from ..recognizers import Declined, Layer, evaluation_mode, read, read_unknown, same_layers
from .lower import check_steps


def chain_of(model: nn.Module, shape: tuple[int, int, int] | None = None) -> tuple[Layer, ...]:
    """The layers of a model in evaluation mode for images of `shape` (C, H, W), any number of them.

    Without a shape, for images of a usual size.

    Raises:
        Declined: the model is no chain of layers that a plan has; the sentence says why.
    """
    with evaluation_mode(model):
        if shape is None:
            layers = read_unknown(model, [model]).layers
        else:
            reading = read(model, (1, *shape), [model])
            layers = reading.layers
            if reading.is_sized and not same_layers(
                layers, read(model, (3, *shape), [model]).layers
            ):
                raise Declined("its forward depends on the number of images")
    check_steps(layers)
    return layers


def image_shape(function: str, input_shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of an `input_shape` with or without a number of images.

    Raises:
        TypeError, ValueError: in the name of a public function, where it is none.
    """
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
        kind = type(input_shape).__name__
        raise TypeError(f"{function}: input_shape must be a sequence of integers, got {kind}")
    sizes = tuple(input_shape)
    whole = all(isinstance(n, SupportsIndex) and not isinstance(n, bool | Tensor) for n in sizes)
    if not whole or len(sizes) not in (3, 4) or min(sizes) < 0 or min(sizes[-3:]) < 1:
        raise ValueError(f"{function}: input_shape must be (C, H, W) or (N, C, H, W), got {sizes}")
    if max(sizes) >= 2**31:
        raise ValueError(f"{function}: input_shape must be below 2**31 in all sizes, got {sizes}")
    channels, height, width = map(index, sizes[-3:])
    return channels, height, width
