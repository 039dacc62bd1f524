"""Which blocks look like an inverted residual but cannot be fused exactly, and why."""

from functools import partial

import pytest
import torch
import torchvision
from declined_blocks import (
    FusedMBConv,
    OddDropout,
    OddNorm,
    OddReLU,
    Opaque,
    Scale,
    ScaledConvolution,
    edited_padding,
    flat_changed,
    flat_lazy,
    flat_with,
    mmcv_changed,
    norm_last,
    norm_with_drop,
    old_weight_normed,
    own_parameter,
    qat_conv,
    replaced_forward,
    sparse,
    weight_normed,
    with_hook,
)
from foreign_blocks import (
    ConvBNReLU,
    Flat,
    Kuangliu,
    conv_norm_act,
    cvnets_block,
    edited,
    flow,
    lukemelas,
    mobile_vit_block,
    old_timm_same,
    smp_block,
    timm_block,
    transformers_block,
    universal_block,
    v3,
)
from timm.layers import Conv2dSame
from timm.models._efficientnet_blocks import (
    CondConvResidual,
    EdgeResidual,
    SqueezeExcite,
)
from torch import nn
from torchvision.models.efficientnet import FusedMBConv as TorchvisionFusedMBConv
from torchvision.models.efficientnet import FusedMBConvConfig, MBConv, MBConvConfig
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock
from torchvision.models.quantization.mobilenetv2 import QuantizableInvertedResidual
from torchvision.models.resnet import BasicBlock

import mnv2_kernels as mk
from mnv2_kernels.recognizers import Declined, recognize

pytestmark = pytest.mark.usefixtures("one_thread")


DECLINED = {
    "v3 squeeze-excite": (lambda: v3(se=True), "SqueezeExcitation is not"),
    "v3 hard swish": (lambda: v3(act="HS"), "Hardswish is not"),
    "torchvision MBConv": (
        lambda: MBConv(MBConvConfig(3, 3, 1, 8, 8, 1), 0.1, nn.BatchNorm2d),
        "SiLU is not",
    ),
    "torchvision FusedMBConv": (
        lambda: TorchvisionFusedMBConv(FusedMBConvConfig(3, 3, 1, 8, 8, 1), 0.1, nn.BatchNorm2d),
        "SiLU is not",
    ),
    "FusedMBConv": (FusedMBConv, "one group per channel, got groups=1 for 8 -> 24"),
    "quantizable": (lambda: QuantizableInvertedResidual(8, 8, 1, 6), "skip_add"),
    "timm squeeze-excite": (
        lambda: timm_block(se_layer=SqueezeExcite),
        "se is SqueezeExcite, expected Identity",
    ),
    "timm anti-aliasing": (
        lambda: timm_block(stride=2, aa_layer=partial(nn.AvgPool2d, 2)),
        "aa is AvgPool2d",
    ),
    "timm space to depth": (lambda: timm_block(s2d=1), "further children: conv_s2d"),
    "timm SiLU": (lambda: timm_block(act_layer=nn.SiLU), "SiLU in BatchNormAct2d is not ReLU"),
    "timm drop in norm": (norm_with_drop, "BatchNormAct2d drops values: Dropout"),
    "timm SAME at stride 2 with a residual": (
        lambda: old_timm_same(stride=2),
        "its residual flag is set, but shapes differ",
    ),
    "timm SAME at stride 2, dilated": (
        lambda: edited(
            timm_block(out_channels=16),
            "conv_dw",
            Conv2dSame(24, 24, 3, stride=2, dilation=2, groups=24),
        ),
        r"must go without dilation, got \(2, 2\)",
    ),
    "padding before SAME at stride 2": (
        lambda: Flat(
            [
                *flow()[:3],
                nn.ZeroPad2d(1),
                Conv2dSame(24, 24, 3, stride=2, groups=24),
                *flow()[4:],
            ],
            False,
        ),
        "Conv2dSame at stride 2 pads according to the size",
    ),
    "timm group size": (lambda: timm_block(group_size=8), "got groups=3"),
    "timm 3x3 projection": (
        lambda: timm_block(pw_kernel_size=3),
        r"projection must be a 1x1 convolution .* kernel_size=\(3, 3\)",
    ),
    "timm CondConv": (
        lambda: timm_block(CondConvResidual, exp_ratio=3.0, num_experts=2),
        "further children: routing_fn",
    ),
    "timm EdgeResidual": (lambda: timm_block(EdgeResidual), "EdgeResidual"),
    "timm universal, depthwise first": (
        lambda: universal_block(dw_kernel_size_start=3),
        "dw_start is ConvNormAct, expected Identity",
    ),
    "timm universal, depthwise last": (
        lambda: universal_block(dw_kernel_size_end=3),
        "dw_end is ConvNormAct, expected Identity",
    ),
    "timm universal, layer scale": (
        lambda: universal_block(layer_scale_init_value=0.1),
        "layer_scale is LayerScale2d, expected Identity",
    ),
    "timm universal, no depthwise": (
        lambda: universal_block(dw_kernel_size_mid=0),
        "it has 2 convolutions|one group per channel",
    ),
    "timm universal, anti-aliasing": (
        lambda: universal_block(8, 16, stride=2, aa_layer=nn.AvgPool2d),
        "AvgPool2d is not",
    ),
    "transformers MobileViT": (mobile_vit_block, "SiLUActivation is not"),
    "transformers padded twice": (
        lambda: edited_padding(transformers_block()),
        "padded both by its module and by itself",
    ),
    "mmcv, activation first": (
        lambda: mmcv_changed("order", ("act", "conv", "norm")),
        "runs its layers in another order: act, conv, norm",
    ),
    "mmcv, padding layer": (
        lambda: mmcv_changed("with_explicit_padding", True),
        "pads by a layer of its own",
    ),
    "cvnets, swish": (lambda: cvnets_block(act=nn.SiLU), "SiLU is not"),
    "smp": (smp_block, "SiLU is not"),
    "lukemelas squeeze-excite": (lambda: lukemelas(se_ratio=0.25), "squeeze-excite"),
    "lukemelas swish": (lambda: lukemelas(relu_fn="swish"), "MemoryEfficientSwish is not"),
    "kuangliu convolution shortcut": (lambda: Kuangliu(8, 24, 16, 1), "shortcut is a module"),
    "kuangliu": (lambda: Kuangliu(8, 24, 8, 1), "shortcut is a module"),
    "SiLU": (lambda: Flat(flow(act=nn.SiLU), True), "SiLU is not"),
    "subclassed ReLU6": (lambda: flat_with(2, OddReLU()), "OddReLU is not"),
    "two activations": (
        lambda: Flat([*flow()[:3], nn.ReLU(), *flow()[3:]], True),
        "ReLU follows another activation",
    ),
    "group norm": (lambda: flat_with(1, nn.GroupNorm(2, 24)), "GroupNorm is not"),
    "instance norm": (lambda: flat_with(1, nn.InstanceNorm2d(24)), "InstanceNorm2d is not"),
    "subclassed norm": (lambda: flat_with(1, OddNorm(24)), "OddNorm is not"),
    "two norms": (
        lambda: Flat([*flow()[:2], nn.BatchNorm2d(24), *flow()[2:]], True),
        "BatchNorm2d does not follow a convolution",
    ),
    "norm after activation": (
        norm_last,
        "BatchNorm2d does not follow a convolution",
    ),
    "no running statistics": (
        lambda: flat_with(1, nn.BatchNorm2d(24, track_running_stats=False)),
        "no running statistics",
    ),
    "norm of other size": (lambda: flat_with(1, nn.BatchNorm2d(12)), "follows 24 channels"),
    "subclassed dropout": (lambda: Flat([*flow(), OddDropout(0.1)], True), "OddDropout is not"),
    "forward hook": (lambda: with_hook("register_forward_hook"), "conv.3 has hooks"),
    "forward pre-hook": (lambda: with_hook("register_forward_pre_hook"), "conv.3 has hooks"),
    "backward hook": (lambda: with_hook("register_full_backward_hook"), "conv.3 has hooks"),
    "parametrized": (weight_normed, "conv.0 is parametrized"),
    "old weight norm": (old_weight_normed, "conv.0 has hooks"),
    "quantisation-aware": (qat_conv, "overrides"),
    "quantised": (
        lambda: flat_with(0, torch.ao.nn.quantized.Conv2d(8, 24, 1)),
        "quantised Conv2d stands where",
    ),
    "subclassed convolution": (lambda: flat_with(0, Scale(8, 24, 1)), "Scale overrides the f"),
    "subclassed _conv_forward": (
        lambda: flat_with(0, ScaledConvolution(8, 24, 1)),
        "ScaledConvolution overrides the convolution",
    ),
    "opaque layer": (
        lambda: Flat([*flow()[:3], Opaque(*flow()[3:])], True),
        "Opaque is not",
    ),
    "further child": (
        lambda: flat_changed(lambda b: b.add_module("shortcut", nn.Identity())),
        r"further children: shortcut \(Identity\)",
    ),
    "own parameter": (own_parameter, "of its own: scale"),
    "no flag": (lambda: Flat(flow(), True, None), "cannot be read from a flag"),
    "flags disagree": (
        lambda: flat_changed(lambda b: setattr(b, "has_skip", False)),
        "flags disagree",
    ),
    "flag against stride": (lambda: Flat(flow(stride=2), True), "shapes differ"),
    "flag against channels": (lambda: Flat(flow(8, 24, 16), True), "shapes differ"),
    "flag against size": (lambda: Flat(flow(padding=0), True), "shapes differ"),
    "reflected padding": (
        lambda: Flat(flow(padding_mode="reflect"), True),
        "padding_mode must be 'zeros', got 'reflect'",
    ),
    "kernel 7": (lambda: Flat(flow(kernel=7), True), r"kernel_size in \(3, 5\), got \(7, 7\)"),
    "stride 3": (lambda: Flat(flow(stride=3), False), r"stride in \(1, 2\), got \(3, 3\)"),
    "uneven stride": (lambda: Flat(flow(stride=(1, 2)), False), r"got \(1, 2\)"),
    "dilation 3": (lambda: Flat(flow(padding=3, dilation=3), True), "dilation"),
    "too much padding": (lambda: Flat(flow(padding=3), False), "padding must be from 0 to 2"),
    "strided expansion": (
        lambda: flat_with(0, nn.Conv2d(8, 24, 1, 2)),
        r"expansion must be a 1x1 .* stride=\(2, 2\)",
    ),
    "grouped projection": (
        lambda: flat_with(6, nn.Conv2d(24, 8, 1, groups=2)),
        "projection must be .* groups=2",
    ),
    "padding before the expansion": (
        lambda: Flat([nn.ZeroPad2d(1), *flow(padding=0)], True),
        "expansion must be .* padding",
    ),
    "padding at the end": (
        lambda: Flat([*flow(), nn.ZeroPad2d(1)], False),
        "padding after the last",
    ),
    "padding before a norm": (
        lambda: Flat([*flow()[:1], nn.ZeroPad2d(1), *flow()[1:]], False),
        "BatchNorm2d stands where a convolution",
    ),
    "channels do not match": (
        lambda: flat_with(6, nn.Conv2d(12, 8, 1)),
        "to 24 channels is followed by one from 12",
    ),
    "four convolutions": (
        lambda: Flat([*flow(), *conv_norm_act(8, 8)], True),
        "it has 4 convolutions",
    ),
    "complex": (lambda: Flat(flow(), True).to(torch.complex64), "is complex"),
    "meta": (lambda: Flat(flow(), True).to("meta"), "meta device"),
    "sparse": (sparse, "is not dense"),
    "lazy norm": (lambda: flat_with(1, nn.LazyBatchNorm2d()), "LazyBatchNorm2d is not"),
    "lazy convolution": (flat_lazy, "conv.0 has hooks"),
    "replaced forward": (lambda: replaced_forward(""), "this very module has been replaced"),
    "replaced inner forward": (lambda: replaced_forward("conv.0"), "conv.0 has been replaced"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_with_the_reason(name):
    build, reason = DECLINED[name]
    block = build()
    with pytest.raises(Declined, match=reason):
        recognize(block)
    # And nothing is done to it.
    assert mk.fuse(block, inplace=True) is block
    (row,) = mk.explain(block)
    assert (row.name, row.state) == ("", "declined")


@pytest.mark.parametrize(
    "module",
    [
        BasicBlock(8, 8),
        nn.Sequential(*conv_norm_act(8, 24), *conv_norm_act(24, 24, 3, 1, 24)),
        nn.Conv2d(8, 8, 3),
        ConvBNReLU(*conv_norm_act(8, 8)),
        Flat(conv_norm_act(8, 8, 3), True),
        nn.ModuleList(flow()),
        torch.fx.symbolic_trace(TorchvisionBlock(8, 8, 1, 6)).get_submodule("conv"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_something_else_is_not_mentioned(module):
    assert recognize(module) is None
    assert not mk.explain(module)


def test_a_network_is_no_block():
    """Its `layers` holds depthwise convolutions too; its blocks are found inside."""
    network = torchvision.models.mnasnet0_5()
    assert recognize(network) is None
    assert len(mk.explain(network)) == 17
