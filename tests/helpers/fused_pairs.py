"""A plain block and the same block fused, one pair a family, for tests of fused modules."""

import torch
from foreign_blocks import (
    largest_difference,
    lukemelas,
)
from same_answers import randomise
from timm.models._efficientnet_blocks import InvertedResidual as TimmBlock
from torch import nn
from torchvision.models.mnasnet import _InvertedResidual as MnasnetBlock
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

BUILDERS = {
    "own": lambda: mk.InvertedResidual(8, 8),
    "torchvision": lambda: TorchvisionBlock(8, 8, 1, 6),
    "timm": lambda: TimmBlock(8, 8, exp_ratio=3.0, act_layer=nn.ReLU6),
    "mnasnet": lambda: MnasnetBlock(8, 8, 3, 1, 3),
    "lukemelas": lukemelas,
}


def make_pair(family):
    """(a plain block, the same block fused): float64, separate tensors of equal values."""
    block = randomise(BUILDERS[family]()).double()
    fused = mk.fuse(block, backend="reference")
    if isinstance(block, mk.InvertedResidual):
        block.forward = block.plain_forward
    return block, fused


def image(dtype=torch.float64, size=6):
    return 3 * torch.randn(2, 8, size, size, dtype=dtype)


def assert_same(block, fused, x=None):
    """The fused module runs fused, and computes what the plain one does."""
    x = image() if x is None else x
    assert fused.why_plain(x) is None
    assert largest_difference(fused(x), block(x)) < 1e-11
