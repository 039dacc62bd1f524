"""What belongs to a block: a depthwise before it, or one of two convolutions in a row."""

from math import inf

import pytest
import torch
from foreign_blocks import conv_norm_act, largest_difference, universal_block
from same_answers import randomise
from torch import nn

import mnv2_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_block_that_begins_with_a_depthwise():
    """Its result is channels_last whatever x is, and its repr says what it does."""
    block = randomise(universal_block(dw_kernel_size_start=3))
    fused = mk.fuse(block)
    with torch.no_grad():
        y = fused(torch.randn(2, 8, 7, 6))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert "residual=True, another depthwise first" in repr(fused)
    with pytest.raises(
        ValueError, match="^fold: UniversalInvertedResidual cannot be folded: it be"
    ):
        mk.fold(block)


def test_an_infinite_weight_over_padding_of_the_first_depthwise():
    block = randomise(universal_block(dw_kernel_size_start=3))
    with torch.no_grad():
        block.dw_start.conv.weight[0, 0, 0, 0] = inf
        x = torch.rand(1, 8, 6, 6) + 1
        assert torch.equal(mk.fuse(block)(x).isnan(), block(x).isnan())


def test_two_separable_convolutions_are_two_blocks():
    layers = [
        *conv_norm_act(16, 16, 3, groups=16, act=None),
        *conv_norm_act(16, 32),
        *conv_norm_act(32, 32, 3, groups=32, act=None),
        *conv_norm_act(32, 32, act=None),
    ]
    rows = mk.explain(mk.fuse(randomise(nn.Sequential(*layers))))
    assert [row.config.name for row in rows] == ["16x16x32-s1-k3", "32x32x32-s1-k3"]


def test_convolutions_of_one_pixel_are_fully_connected():
    head = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 128, 1), nn.Hardswish(), nn.Conv2d(128, 10, 1)]
    model = randomise(nn.Sequential(*conv_norm_act(3, 64, 3, 2), *head, nn.Flatten()))
    x = torch.randn(2, 3, 24, 24)
    assert largest_difference(mk.plan(model, x.shape)(x), model(x)) < 1e-5
