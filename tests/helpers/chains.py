"""Chains of layers as children of an nn.Sequential, fused and compared."""

import torch
from foreign_blocks import (
    conv_norm_act,
)
from same_answers import randomise
from torch import nn

import mnv2_kernels as mk


def pair(in_channels=8, out_channels=8, stride=1, act=nn.ReLU6, kernel=3):
    """The six layers of MobileNetV1's block."""
    return [
        *conv_norm_act(in_channels, in_channels, kernel, stride, in_channels, act),
        *conv_norm_act(in_channels, out_channels, act=act),
    ]


def mobilenet_v1() -> nn.Sequential:
    """Every layer a child: a stem, three pairs, a last 1x1 and a pool."""
    return randomise(
        nn.Sequential(
            *conv_norm_act(3, 8, 3, 2),
            *pair(8, 16),
            *pair(16, 16, 2, nn.ReLU),
            *pair(16, 8, 1, kernel=5),
            *conv_norm_act(8, 12),
            nn.AdaptiveAvgPool2d(1),
        )
    ).double()


def image(channels=3, size=(24, 21)):
    return 3 * torch.randn(2, channels, *size, dtype=torch.float64)


def fuse(model, **settings):
    return mk.fuse(model, backend="reference", **settings)


def spans(model) -> list[str]:
    return [row.name for row in mk.explain(model) if row.state in ("fused", "fusable")]


def assert_same(fused, model, x):
    with torch.no_grad():
        y, z = fused(x), model(x)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12 * z.abs().max().item())
