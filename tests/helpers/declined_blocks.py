"""Blocks that look like an inverted residual and compute something else."""

import torch
from foreign_blocks import (
    Flat,
    flow,
    mmcv_block,
    timm_block,
)
from torch import nn
from torch.nn.utils import parametrizations


class Scale(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class ScaledConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class OddReLU(nn.ReLU6):
    def forward(self, x):
        return super().forward(x) + 1


class OddNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OddDropout(nn.Dropout):
    def forward(self, x):
        return 2 * super().forward(x)


class Opaque(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.steps = nn.Sequential(*layers)

    def forward(self, x):
        return self.steps(x)


def flat_with(index, module, **settings):
    layers = flow(**settings)
    layers[index] = module
    return Flat(layers, True)


def flat_changed(change, **settings):
    block = Flat(flow(**settings), True)
    change(block)
    return block


def ignore(*args):
    """A hook that does nothing."""


def with_hook(register):
    block = Flat(flow(), True)
    getattr(block.conv[3], register)(ignore)
    return block


def qat_conv():
    conv = torch.ao.nn.qat.Conv2d(8, 24, 1, qconfig=torch.ao.quantization.default_qat_qconfig)
    return flat_with(0, conv)


def weight_normed():
    return flat_changed(lambda b: parametrizations.weight_norm(b.conv[0]))


def old_weight_normed():
    return flat_changed(lambda b: torch.nn.utils.weight_norm(b.conv[0]))


def own_parameter():
    return flat_changed(lambda b: b.register_parameter("scale", nn.Parameter(torch.ones(1))))


def replaced_forward(name):
    def change(block):
        inner = block.get_submodule(name)
        inner.forward = inner.forward

    return flat_changed(change)


def norm_with_drop():
    block = timm_block()
    block.bn1.drop = nn.Dropout(0.5)
    return block


def norm_last():
    conv, norm, act, *rest = flow()
    return Flat([conv, act, norm, *rest], True)


def mmcv_changed(name, value):
    block = mmcv_block()
    setattr(block.conv[1], name, value)
    return block


def edited_padding(block):
    block.conv_3x3.convolution.padding = (1, 1)
    return block


def flat_lazy():
    block = Flat([nn.LazyConv2d(24, 1), *flow()[1:]], False)
    assert block.conv[0].in_channels == 0
    return block


def sparse():
    def change(block):
        dense = block.conv[6].weight
        block.conv[6].weight = nn.Parameter(dense.detach().to_sparse(), requires_grad=False)

    return flat_changed(change)
