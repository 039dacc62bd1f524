"""The convolutions that stand outside of blocks as steps of a program: folded and laid out."""

import torch

from ..block.config import Padding
from ..block.fold import ConvNorm, fold_conv_norm, same_padding_by_two
from ..recognizers import Declined
from .program import Pointwise, Shape, Stem


def stem(stage: ConvNorm, name: str, padding: Padding | None, shape: Shape) -> Stem:
    """The first convolution of a network, for images of `shape`; declines others."""
    conv = stage.conv
    found = (conv.kernel_size, conv.stride, conv.dilation, conv.groups)
    if padding is None:
        padding = same_padding_by_two(3, *shape[1:])
    if found != ((3, 3), (2, 2), (1, 1), 1) or max(padding) > 2:
        raise Declined(
            f"{name} must be a 3x3 convolution with stride 2, dilation 1, 1 group and"
            f" at most 2 zeros around its input, got kernel_size={found[0]}, stride={found[1]},"
            f" dilation={found[2]}, groups={found[3]}, padding={padding}"
        )
    with torch.no_grad():
        weight, bias = fold_conv_norm(stage)
    weight = weight.permute(3, 2, 1, 0).contiguous()
    return Stem(conv.in_channels, conv.out_channels, padding, weight, bias, stage.clip)


def pointwise(stage: ConvNorm, name: str, padding: Padding | None) -> Pointwise:
    """A 1x1 convolution; declines others."""
    conv = stage.conv
    found = (conv.kernel_size, conv.stride, conv.groups, padding)
    if found != ((1, 1), (1, 1), 1, (0, 0, 0, 0)):
        raise Declined(
            f"{name} must be a 1x1 convolution with stride 1, 1 group and no padding,"
            f" got kernel_size={found[0]}, stride={found[1]}, groups={found[2]},"
            f" padding={found[3]}"
        )
    with torch.no_grad():
        weight, bias = fold_conv_norm(stage)
    weight = weight[:, :, 0, 0].t().contiguous()
    return Pointwise(conv.in_channels, conv.out_channels, weight, bias, stage.clip)
