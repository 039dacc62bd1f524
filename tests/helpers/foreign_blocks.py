"""Blocks as other people write them, with batch norms that do something, for the recognisers."""

import torch
from efficientnet_lite_pytorch import utils as lite_utils
from efficientnet_lite_pytorch.model import MBConvBlock
from segmentation_models_pytorch.encoders import _efficientnet as smp_efficientnet
from timm.layers import Conv2dSame
from timm.models._efficientnet_blocks import InvertedResidual as TimmBlock
from timm.models._efficientnet_blocks import UniversalInvertedResidual
from torch import nn
from torch.nn import functional as F
from torchvision.models.mobilenetv3 import InvertedResidual as MobileNetV3Block
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from transformers import MobileNetV2Config, MobileViTConfig
from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import (
    MobileNetV2InvertedResidual,
    MobileNetV2Stem,
)
from transformers.models.mobilevit.modeling_mobilevit import MobileViTInvertedResidual


def conv_norm_act(
    in_channels, out_channels, kernel=1, stride=1, groups=1, act=nn.ReLU6, padding=None, **kwargs
) -> list[nn.Module]:
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False, **kwargs
    )
    return [conv, nn.BatchNorm2d(out_channels), *([act()] if act else [])]


def flow(in_channels=8, hidden=24, out_channels=8, stride=1, kernel=3, act=nn.ReLU6, **depthwise):
    """The layers of one block in order; without the first three where hidden == in_channels."""
    expand = conv_norm_act(in_channels, hidden, act=act) if hidden != in_channels else []
    return [
        *expand,
        *conv_norm_act(hidden, hidden, kernel, stride, hidden, act, **depthwise),
        *conv_norm_act(hidden, out_channels, act=None),
    ]


def mobilenet_v1_pair(act, stride=1):
    """Depthwise and 1x1, both with an activation: what MobileNetV1 is made of."""
    return nn.Sequential(
        *conv_norm_act(8, 8, 3, stride, 8, act=act), *conv_norm_act(8, 16, act=act)
    )


class Flat(nn.Module):
    """One flat Sequential and a flag, as in tonylins' and d-li14's files."""

    def __init__(self, layers, residual, flag="use_res_connect"):
        super().__init__()
        self.conv = nn.Sequential(*layers)
        self.adds = flag
        if flag:
            setattr(self, flag, residual)

    def forward(self, x):
        y = self.conv(x)
        return x + y if self.adds and getattr(self, self.adds) else y


class ConvBNReLU(nn.Sequential):
    """The name of torchvision's Conv2dNormActivation before 0.13."""


class DepSepConv(nn.Sequential):
    """Depthwise and projection together."""


class Nested(nn.Module):
    """`residual` is the body here, a Sequential of Sequentials."""

    def __init__(self, layers, residual):
        super().__init__()
        expand = [nn.Sequential(*layers[:-5])] if len(layers) > 5 else []
        self.residual = nn.Sequential(
            *expand, DepSepConv(ConvBNReLU(*layers[-5:-2]), nn.Sequential(*layers[-2:]))
        )
        self.use_shortcut = residual

    def forward(self, x):
        y = self.residual(x)
        return y + x if self.use_shortcut else y


class OldTorchvision(nn.Module):
    """torchvision's InvertedResidual as pickled before 0.13: no out_channels, older names."""

    def __init__(self, layers, residual):
        super().__init__()
        expand = [ConvBNReLU(*layers[:-5])] if len(layers) > 5 else []
        self.conv = nn.Sequential(*expand, ConvBNReLU(*layers[-5:-2]), *layers[-2:])
        self.use_res_connect = residual

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class Kuangliu(nn.Module):
    """The block of pytorch-cifar's mobilenetv2.py: a convolution in the shortcut."""

    def __init__(self, in_channels, hidden, out_channels, stride):
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = conv_norm_act(in_channels, hidden, act=None)
        self.conv2, self.bn2 = conv_norm_act(hidden, hidden, 3, stride, hidden, act=None)
        self.conv3, self.bn3 = conv_norm_act(hidden, out_channels, act=None)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_channels != out_channels:
            self.shortcut = nn.Sequential(*conv_norm_act(in_channels, out_channels, act=None))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self.stride == 1 else y


def lukemelas(
    in_channels=8, out_channels=8, expand_ratio=3, stride=1, kernel=3, image_size=16, **changes
) -> MBConvBlock:
    """MBConvBlock of efficientnet_lite_pytorch; image_size None pads at run time."""
    arguments = lite_utils.BlockArgs(
        num_repeat=1,
        kernel_size=kernel,
        stride=stride,
        expand_ratio=expand_ratio,
        input_filters=in_channels,
        output_filters=out_channels,
        se_ratio=changes.get("se_ratio"),
        id_skip=changes.get("id_skip", True),
    )
    settings = lite_utils.GlobalParams(
        batch_norm_momentum=0.99,
        batch_norm_epsilon=1e-3,
        relu_fn=changes.get("relu_fn", "relu6"),
    )
    return MBConvBlock(arguments, settings, image_size=image_size)


def smp_block(expand_ratio=3, stride=1, image_size=None, act=None, id_skip=True, se_ratio=None):
    """MBConvBlock of segmentation_models_pytorch, whose activation is SiLU unless replaced."""
    arguments = smp_efficientnet.BlockArgs(
        num_repeat=1,
        kernel_size=3,
        stride=stride,
        expand_ratio=expand_ratio,
        input_filters=8,
        output_filters=8,
        se_ratio=se_ratio,
        id_skip=id_skip,
    )
    settings = smp_efficientnet.GlobalParams(batch_norm_momentum=0.99, batch_norm_epsilon=1e-3)
    block = smp_efficientnet.MBConvBlock(arguments, settings, image_size)
    return edited(block, "_swish", act()) if act else block


def transformers_block(out_channels=8, stride=1, dilation=1, **settings):
    config = MobileNetV2Config(expand_ratio=3.0, **settings)
    return MobileNetV2InvertedResidual(config, 8, out_channels, stride, dilation)


def transformers_stem(**settings):
    return MobileNetV2Stem(MobileNetV2Config(**settings), 8, 24, 16)


def mobile_vit_block():
    return MobileViTInvertedResidual(MobileViTConfig(), 8, 8, 1)


class ConvModule(nn.Module):
    """What mmcv's module of this name has and does, with its usual settings."""

    def __init__(self, layers):
        super().__init__()
        self.order = ("conv", "norm", "act")
        self.with_norm, self.with_activation = True, len(layers) == 3
        self.with_explicit_padding = self.with_spectral_norm = False
        self.norm_name = "bn"
        self.conv, self.bn = layers[:2]
        if self.with_activation:
            self.activate = layers[2]

    def forward(self, x, activate=True, norm=True):
        x = self.conv(x)
        if norm and self.with_norm:
            x = getattr(self, self.norm_name)(x)
        return self.activate(x) if activate and self.with_activation else x


def mmcv_block(**settings):
    """mmpretrain's InvertedResidual: three ConvModules in a Sequential."""
    layers = flow(**settings)
    units = [layers[:-5], layers[-5:-2], layers[-2:]]
    return Flat([ConvModule(unit) for unit in units if unit], settings.get("stride", 1) == 1)


class ConvLayer2d(nn.Module):
    """What ml-cvnets' module of this name has and does."""

    def __init__(self, layers):
        super().__init__()
        self.block = nn.Sequential()
        for name, layer in zip(("conv", "norm", "act"), layers, strict=False):
            self.block.add_module(name, layer)
        self.norm_name = type(layers[1]).__name__
        self.act_name = type(layers[2]).__name__ if len(layers) == 3 else None

    def forward(self, x):
        return self.block(x)


class CvnetsBlock(nn.Module):
    """ml-cvnets' InvertedResidual."""

    def __init__(self, layers, residual):
        super().__init__()
        self.block = nn.Sequential()
        units = {"exp_1x1": layers[:-5], "conv_3x3": layers[-5:-2], "red_1x1": layers[-2:]}
        for name, unit in units.items():
            if unit:
                self.block.add_module(name, ConvLayer2d(unit))
        self.use_res_connect = residual

    def forward(self, x, *args, **kwargs):
        return x + self.block(x) if self.use_res_connect else self.block(x)


def cvnets_block(residual=True, **settings):
    return CvnetsBlock(flow(**settings), residual)


def v3(hidden=24, out_channels=8, stride=1, dilation=1, se=False, act="RE", kernel=3):
    config = InvertedResidualConfig(8, kernel, hidden, out_channels, se, act, stride, dilation, 1.0)
    return MobileNetV3Block(config, nn.BatchNorm2d)


def edited(block, path, module):
    """The block with a child replaced."""
    parent, _, name = path.rpartition(".")
    block.get_submodule(parent)._modules[name] = module
    return block


def timm_block(block_type=TimmBlock, in_channels=8, out_channels=8, **settings):
    if block_type is TimmBlock:
        settings.setdefault("exp_ratio", 3.0)
    settings.setdefault("act_layer", nn.ReLU6)
    settings.setdefault("norm_layer", nn.BatchNorm2d)
    return block_type(in_channels, out_channels, **settings)


def universal_block(in_channels=8, out_channels=8, **settings):
    """The block of MobileNetV4, with its depthwise in the middle unless told otherwise."""
    settings = {"exp_ratio": 3.0, "layer_scale_init_value": None} | settings
    return timm_block(UniversalInvertedResidual, in_channels, out_channels, **settings)


def old_timm_same(stride=1, kernel=3, **settings):
    """A timm block whose depthwise pads as TensorFlow does, at run time."""
    block = timm_block(dw_kernel_size=kernel, **settings)
    same = Conv2dSame(24, 24, kernel, stride=stride, groups=24, bias=False)
    return edited(block, "conv_dw", same)


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest difference of two results over the largest value."""
    return ((first - second).abs().max() / second.abs().max()).item()
