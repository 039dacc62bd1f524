"""Blocks of many families and layers between them, for random networks: as plain data, so that
what was drawn can be written down.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torchvision
from declined_blocks import OddNorm, OddReLU, ignore
from foreign_blocks import (
    Flat,
    Kuangliu,
    Nested,
    OldTorchvision,
    conv_norm_act,
    cvnets_block,
    flow,
    lukemelas,
    mmcv_block,
    timm_block,
    universal_block,
)
from timm.layers import EffectiveSEModule
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, SqueezeExcite
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models.mnasnet import _InvertedResidual as MnasnetBlock
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock
from torchvision.models.mobilenetv3 import InvertedResidual as MobileNetV3Block
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from transformers import MobileNetV2Config
from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import MobileNetV2InvertedResidual

import mnv2_kernels as mk


@dataclass(frozen=True)
class Piece:
    """A block, or a layer between blocks, that makes `channels` channels.

    `change` is what becomes of one of its layers: (a kind of layer, what it is changed into, which
    of them, counted round).
    """

    kind: str
    channels: int
    stride: int = 1
    kernel: int = 3
    ratio: int = 2
    dilation: int = 1
    change: tuple[str, str, int] | None = None


class Stages(nn.Module):
    """Every stage a child of its own, as in KernelBench."""

    def __init__(self, layers, residual):
        super().__init__()
        if len(layers) > 5:
            self.expand_conv = nn.Sequential(*layers[:-5])
        self.depthwise_conv = nn.Sequential(*layers[-5:-2])
        self.project_conv = nn.Sequential(*layers[-2:])
        self.use_residual = residual

    def forward(self, x):
        y = self.expand_conv(x) if hasattr(self, "expand_conv") else x
        y = self.project_conv(self.depthwise_conv(y))
        return x + y if self.use_residual else y


def _layers(channels: int, piece: Piece, act=nn.ReLU6) -> list[nn.Module]:
    padding = piece.dilation * (piece.kernel - 1) // 2
    sizes = channels, piece.ratio * channels, piece.channels, piece.stride, piece.kernel
    return flow(*sizes, act, dilation=piece.dilation, padding=padding)


def _adds(channels: int, piece: Piece) -> bool:
    return piece.stride == 1 and piece.channels == channels


def _written(kind: type[nn.Module], channels: int, piece: Piece) -> nn.Module:
    return kind(_layers(channels, piece), _adds(channels, piece))


def _units(make: Callable, channels: int, piece: Piece) -> nn.Module:
    padding = piece.dilation * (piece.kernel - 1) // 2
    settings = {"dilation": piece.dilation, "padding": padding, "stride": piece.stride}
    block = make(
        in_channels=channels,
        hidden=piece.ratio * channels,
        out_channels=piece.channels,
        kernel=piece.kernel,
        **settings,
    )
    block.use_res_connect = _adds(channels, piece)
    return block


def _v3(channels: int, piece: Piece, se: bool = False, act: str = "RE") -> nn.Module:
    config = InvertedResidualConfig(8, 3, 8, 8, se, act, piece.stride, piece.dilation, 1.0)
    # The constructor rounds channels to multiples of 8.
    config.input_channels, config.out_channels = channels, piece.channels
    config.expanded_channels, config.kernel = piece.ratio * channels, piece.kernel
    return MobileNetV3Block(config, nn.BatchNorm2d)


def _timm(channels: int, piece: Piece, **settings) -> nn.Module:
    sizes = {"stride": piece.stride, "dilation": piece.dilation, "exp_ratio": float(piece.ratio)}
    sizes["dw_kernel_size"] = piece.kernel
    return timm_block(in_channels=channels, out_channels=piece.channels, **sizes | settings)


def _timm_separable(channels: int, piece: Piece) -> nn.Module:
    return timm_block(
        DepthwiseSeparableConv,
        channels,
        piece.channels,
        stride=piece.stride,
        dw_kernel_size=piece.kernel,
        pw_act=piece.ratio % 2 == 0,
    )


def _universal(channels: int, piece: Piece) -> nn.Module:
    return universal_block(
        channels,
        piece.channels,
        stride=piece.stride,
        exp_ratio=float(piece.ratio),
        dw_kernel_size_mid=piece.kernel,
    )


def _lukemelas(channels: int, piece: Piece, **changes) -> nn.Module:
    sizes = piece.ratio, piece.stride, piece.kernel
    image_size = None if piece.kernel == 3 else 16
    return lukemelas(channels, piece.channels, *sizes, image_size, **changes)


def _transformers(channels: int, piece: Piece) -> nn.Module:
    config = MobileNetV2Config(expand_ratio=float(piece.ratio), tf_padding=piece.kernel == 3)
    return MobileNetV2InvertedResidual(
        config, channels, piece.channels, piece.stride, 1 if piece.stride == 2 else piece.dilation
    )


def _kuangliu(channels: int, piece: Piece) -> nn.Module:
    return Kuangliu(channels, piece.ratio * channels, piece.channels, piece.stride)


def _no_flag(channels: int, piece: Piece) -> nn.Module:
    return Flat(_layers(channels, replace(piece, stride=1, channels=channels)), True, None)


def _own(channels: int, piece: Piece) -> nn.Module:
    return mk.InvertedResidual(
        channels,
        piece.channels,
        stride=piece.stride,
        expand_ratio=piece.ratio,
        kernel_size=piece.kernel,
    )


# Modules that are a block each.
BLOCKS: dict[str, Callable[[int, Piece], nn.Module]] = {
    "own": _own,
    "torchvision": lambda c, p: TorchvisionBlock(c, p.channels, p.stride, p.ratio),
    "mnasnet": lambda c, p: MnasnetBlock(c, p.channels, p.kernel, p.stride, p.ratio),
    "v3": _v3,
    "v3-gate": partial(_v3, se=True),
    "v3-hardswish": partial(_v3, act="HS"),
    "v3-gate-hardswish": partial(_v3, se=True, act="HS"),
    "timm": _timm,
    "timm-gate": partial(_timm, se_layer=SqueezeExcite),
    "timm-silu-gate": partial(_timm, se_layer=SqueezeExcite, act_layer=nn.SiLU),
    "timm-gelu": partial(_timm, act_layer=nn.GELU),
    "timm-drop-path": partial(_timm, drop_path_rate=0.2),
    "timm-same": lambda c, p: _timm(c, replace(p, dilation=1), pad_type="same"),
    "timm-separable": _timm_separable,
    "timm-universal": _universal,
    "lukemelas": _lukemelas,
    "lukemelas-gate": partial(_lukemelas, se_ratio=0.25),
    "transformers": _transformers,
    "flat": partial(_written, Flat),
    "nested": partial(_written, Nested),
    "old-torchvision": partial(_written, OldTorchvision),
    "stages": partial(_written, Stages),
    "mmcv": partial(_units, mmcv_block),
    "cvnets": partial(_units, cvnets_block),
    "no-flag": _no_flag,
}
# Modules that look like a block and cannot be fused.
RELATIVES: dict[str, Callable[[int, Piece], nn.Module]] = {
    "timm-gate-by-tanh": partial(_timm, se_layer=partial(SqueezeExcite, gate_layer=nn.Tanh)),
    "timm-gate-of-one-layer": partial(_timm, se_layer=EffectiveSEModule),
    "kuangliu": _kuangliu,
}
# Blocks without a module of their own: layers among others.
CHAINS: dict[str, Callable[[int, Piece], list[nn.Module]]] = {
    "layers": _layers,
    "layers-relu": partial(_layers, act=nn.ReLU),
    "layers-silu": partial(_layers, act=nn.SiLU),
    "pair": lambda c, p: [
        *conv_norm_act(c, c, p.kernel, p.stride, c),
        *conv_norm_act(c, p.channels),
    ],
}
# Layers between blocks.
BESIDE: dict[str, Callable[[int, Piece], list[nn.Module]]] = {
    "pointwise": lambda c, p: conv_norm_act(c, p.channels),
    "pointwise-linear": lambda c, p: conv_norm_act(c, p.channels, act=None),
    "pointwise-hardswish": lambda c, p: conv_norm_act(c, p.channels, act=nn.Hardswish),
    "pointwise-mish": lambda c, p: conv_norm_act(c, p.channels, act=nn.Mish),
    "pointwise-bias": lambda c, p: [nn.Conv2d(c, p.channels, 1), nn.ReLU6()],
    "stem": lambda c, p: conv_norm_act(c, p.channels, 3, 2),
    "dense": lambda c, p: conv_norm_act(c, p.channels, 3, padding="same"),
    "max-pool": lambda c, p: [nn.MaxPool2d(3, 2, 1)],
    "average-pool": lambda c, p: [nn.AvgPool2d(3, 1, 1)],
    "upsample": lambda c, p: [nn.Upsample(scale_factor=2)],
    "relu": lambda c, p: [nn.ReLU()],
    "identity": lambda c, p: [nn.Identity()],
    "dropout": lambda c, p: [nn.Dropout(0.1)],
}
KEEP_CHANNELS = ("max-pool", "average-pool", "upsample", "relu", "identity", "dropout")
CHANGE_SIZE = ("stem", "max-pool", "upsample")


def _reflect(conv: nn.Conv2d) -> None:
    conv.padding_mode = "reflect"


def _replace_forward(conv: nn.Conv2d) -> None:
    conv.forward = conv.forward


def _frozen(channels: int) -> nn.Module:
    norm = torchvision.ops.FrozenBatchNorm2d(channels)
    norm.weight.uniform_(0.5, 1.5)
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 1.5)
    return norm


# What layers may be changed into so that a block stays one that can be fused ...
HARMLESS: dict[str, dict[str, Callable]] = {
    "norm": {
        "frozen": _frozen,
        "none": lambda channels: nn.Identity(),
        "plain": partial(nn.BatchNorm2d, affine=False, eps=1e-2),
        "synchronised": partial(nn.SyncBatchNorm, momentum=0.3),
    },
    "act": {
        "relu": nn.ReLU,
        "clip": partial(nn.Hardtanh, -1.0, 1.5),
        "none": nn.Identity,
        "silu": nn.SiLU,
        "hardswish": nn.Hardswish,
    },
}
# ... and so that it must be declined.
SPOILING: dict[str, dict[str, Callable]] = {
    "norm": {
        "group": partial(nn.GroupNorm, 1),
        "instance": nn.InstanceNorm2d,
        "batch statistics": partial(nn.BatchNorm2d, track_running_stats=False),
        "odd": OddNorm,
    },
    "act": {
        "mish": nn.Mish,
        "leaky": nn.LeakyReLU,
        "odd": OddReLU,
    },
    "conv": {
        "hook": lambda conv: conv.register_forward_hook(ignore),
        "weight norm": parametrizations.weight_norm,
        "reflect": _reflect,
        "forward": _replace_forward,
    },
}


def _sites(block: nn.Module, kind: str) -> list[tuple[nn.Module, str]]:
    """Where the layers of a kind are: parent and name."""
    found = []
    for parent in block.modules():
        for name, child in parent._modules.items():
            is_norm = getattr(child, "running_mean", None) is not None
            is_act = isinstance(child, nn.ReLU | nn.Hardtanh | nn.Hardswish | nn.SiLU | nn.GELU)
            is_kind = {"norm": is_norm, "act": is_act, "conv": isinstance(child, nn.Conv2d)}[kind]
            if is_kind:
                found.append((parent, name))
    return found


def change_layer(block: nn.Module, kind: str, into: str, which: int) -> None:
    """Change one layer inside a block, in place."""
    sites = _sites(block, kind)
    parent, name = sites[which % len(sites)]
    make = (SPOILING[kind] | HARMLESS.get(kind, {}))[into]
    if kind == "conv":
        make(parent._modules[name])
        return
    arguments = (len(parent._modules[name].running_mean),) if kind == "norm" else ()
    parent._modules[name] = make(*arguments).train(block.training)


def is_spoiled(piece: Piece) -> bool:
    return piece.change is not None and piece.change[1] not in HARMLESS.get(piece.change[0], {})


def build_piece(channels: int, piece: Piece) -> list[nn.Module]:
    makers = BLOCKS | RELATIVES | CHAINS | BESIDE
    made = makers[piece.kind](channels, piece)
    modules = made if isinstance(made, list) else [made]
    if piece.change is None:
        return modules
    stage = slice(None)
    if is_spoiled(piece) and piece.kind in CHAINS:
        # Without its expansion, or what follows its projection, a chain is a block all the same:
        # only its depthwise can spoil it.
        begin = next(i for i, m in enumerate(modules) if getattr(m, "groups", 1) > 1)
        stage = slice(begin, begin + 3)
    inside = nn.Sequential(*modules[stage])
    change_layer(inside, *piece.change)
    modules[stage] = inside
    return modules
