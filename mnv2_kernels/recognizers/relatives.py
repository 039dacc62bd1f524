"""Blocks of the same kind whose computation cannot be read from their children: all declined."""

from torch import nn

from .declined import Declined
from .layers import children

_RELATIVES = (
    (
        ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "shortcut"),
        "conv2",
        "its activations are inside forward and its shortcut is a module (pytorch-cifar's Block)",
    ),
    (
        ("depthwise_conv", "squeeze_excite", "projection"),
        None,
        "it has squeeze-excite (EfficientNet of transformers)",
    ),
    (
        ("conv_exp", "bn1", "conv_pwl", "bn2"),
        None,
        "its expansion is not a 1x1 convolution and it has no depthwise (EdgeResidual)",
    ),
)


def recognize(module: nn.Module) -> None:
    """Declines what has the children of a relative; never returns layers."""
    found = children(module)
    for names, depthwise, reason in _RELATIVES:
        if found.keys() >= set(names):
            conv = found.get(depthwise)
            if conv is None or getattr(conv, "groups", 1) == getattr(conv, "in_channels", 0):
                raise Declined(reason)
