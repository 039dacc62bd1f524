"""MobileNetV2 of Hugging Face transformers: three convolution layers with names of their own.

The layers pad as TensorFlow does, by the size of each input, if the model's configuration has
`tf_padding` (the default). The block without expansion is a part of the stem.
"""

from torch import nn

from ..block.fold import BlockLayers
from .layers import assemble, check_only, children, flatten, read_flag

_LAYERS = ("expand_1x1", "conv_3x3", "reduce_1x1")


def recognize(module: nn.Module) -> BlockLayers | None:
    """A block of that library's MobileNetV2, MobileViT and MobileViTV2."""
    found = children(module)
    if found.keys() != set(_LAYERS):
        return None
    check_only(module, _LAYERS)
    layers = [layer for name in _LAYERS for layer in flatten(found[name])]
    return assemble(layers, read_flag(module, ("use_residual",)))


def chain(module: nn.Module) -> dict[str, nn.Module] | None:
    """The layers of MobileNetV2Stem: the network's first convolution, then those of a block."""
    found = children(module)
    if not {"first_conv", "conv_3x3", "reduce_1x1"} <= found.keys() <= {"first_conv", *_LAYERS}:
        return None
    return {name: found[name] for name in ("first_conv", *_LAYERS) if name in found}
