"""Which blocks are recognised, and that they are computed as they were written."""

import copy
from functools import partial
from math import inf

import pytest
import torch
from declined_blocks import Opaque, flat_changed, norm_with_drop, own_parameter
from foreign_blocks import (
    ConvBNReLU,
    Flat,
    Kuangliu,
    Nested,
    OldTorchvision,
    conv_norm_act,
    cvnets_block,
    edited,
    flow,
    largest_difference,
    lukemelas,
    mmcv_block,
    mobilenet_v1_pair,
    old_timm_same,
    smp_block,
    timm_block,
    transformers_block,
    universal_block,
    v3,
)
from same_answers import randomise
from timm.layers import Conv2dSame, ConvMlp, SeparableConv2d, SeparableConvNormAct
from timm.layers.norm_act import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models._efficientnet_blocks import (
    DepthwiseSeparableConv,
    EdgeResidual,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.efficientnet import FusedMBConv, FusedMBConvConfig, MBConv, MBConvConfig
from torchvision.models.mnasnet import _InvertedResidual as MnasnetBlock
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock
from torchvision.models.quantization.mobilenetv2 import QuantizableInvertedResidual
from torchvision.ops import FrozenBatchNorm2d

import mnv2_kernels as mk
from mnv2_kernels.ops.backends import ran

pytestmark = [pytest.mark.sampled(2), pytest.mark.usefixtures("one_thread")]

SIZES = ((9, 12), (6, 5), (8, 10), (7, 11))


class WithoutFlag(nn.Sequential):
    """A Sequential whose own forward adds the input."""

    def __init__(self, layers):
        super().__init__(*layers)

    def forward(self, x):
        return super().forward(x) + x


class Functional(nn.Module):
    """No layers but tensors, and functions that use them."""

    def __init__(self, in_channels, hidden, out_channels):
        super().__init__()
        self.wide = nn.Conv2d(in_channels, hidden, 1)
        self.deep = nn.Conv2d(hidden, hidden, 3, groups=hidden)
        self.narrow = nn.Conv2d(hidden, out_channels, 1)

    def forward(self, x):
        wide, deep, narrow = self.wide, self.deep, self.narrow
        y = F.conv2d(x, wide.weight, wide.bias).clamp(0, 6)
        y = torch.clip(F.conv2d(y, deep.weight, deep.bias, 1, 1, 1, deep.groups), min=0)
        return torch.add(x, F.conv2d(y, narrow.weight, narrow.bias))


def torchvision_t1():
    return TorchvisionBlock(8, 16, 1, 1)


def padded(stride, pads, kernel=3):
    layers = flow(8, 24, 16, stride, kernel, padding=0)
    return Flat([*layers[:3], nn.ZeroPad2d(pads), *layers[3:]], False)


def mbconv():
    """torchvision's EfficientNet block with ReLU6 and without its squeeze-excite."""
    block = MBConv(MBConvConfig(3, 3, 1, 8, 8, 1), 0.5, nn.BatchNorm2d)
    for name in ("0.2", "1.2"):
        edited(block, f"block.{name}", nn.ReLU6())
    return edited(block, "block.2", nn.Identity())


def fused_mbconv(expand_ratio, stride, out_channels):
    config = FusedMBConvConfig(expand_ratio, 3, stride, 8, out_channels, 1)
    return FusedMBConv(config, 0.1, nn.BatchNorm2d)


def prefolded():
    """What deployment scripts do: batch norm already in the convolutions."""
    layers = randomise(nn.Sequential(*flow()))
    for i in (0, 3, 6):
        layers[i] = fuse_conv_bn_eval(layers[i], layers[i + 1])
        layers[i + 1] = nn.Identity()
    return Flat(layers, True)


RECOGNISED = {
    "torchvision": (lambda: TorchvisionBlock(8, 8, 1, 6), True, 1),
    "torchvision-widening": (lambda: TorchvisionBlock(8, 16, 1, 6), False, 1),
    "torchvision-stride2": (lambda: TorchvisionBlock(8, 16, 2, 6), False, 2),
    "torchvision-same-channels-stride2": (lambda: TorchvisionBlock(8, 8, 2, 6), False, 2),
    "torchvision-t1": (torchvision_t1, False, 1),
    "torchvision-t1-residual": (lambda: TorchvisionBlock(8, 8, 1, 1), True, 1),
    "torchvision-frozen": (lambda: TorchvisionBlock(8, 8, 1, 6, FrozenBatchNorm2d), True, 1),
    "torchvision-sync": (lambda: TorchvisionBlock(8, 8, 1, 6, nn.SyncBatchNorm), True, 1),
    "torchvision-before-0.13": (lambda: OldTorchvision(flow(), True), True, 1),
    "torchvision-before-0.13-t1": (lambda: OldTorchvision(flow(8, 8, 16), False), False, 1),
    "torchvision-v3-relu": (v3, True, 1),
    "torchvision-v3-t1": (lambda: v3(hidden=8), True, 1),
    # The flag says no although stride and channels of the layers would allow it.
    "torchvision-v3-dilated": (lambda: v3(stride=2, dilation=2), False, 1),
    "mnasnet-k3": (lambda: MnasnetBlock(8, 8, 3, 1, 3), True, 1),
    "mnasnet-k5-stride2": (lambda: MnasnetBlock(8, 16, 5, 2, 6), False, 2),
    "timm": (timm_block, True, 1),
    "timm-noskip": (lambda: timm_block(noskip=True), False, 1),
    "timm-stride2": (lambda: timm_block(stride=2), False, 2),
    "timm-k5-relu": (lambda: timm_block(dw_kernel_size=5, act_layer=nn.ReLU), True, 1),
    "timm-dilated": (lambda: timm_block(dilation=2), True, 1),
    "timm-drop-path": (lambda: timm_block(drop_path_rate=0.5), True, 1),
    "timm-universal-drop-path": (lambda: universal_block(drop_path_rate=0.5), True, 1),
    "torchvision-mbconv": (mbconv, True, 1),
    "flat-dropout": (lambda: Flat([*flow(), nn.Dropout(0.5)], True), True, 1),
    "flat-dropout-inside": (
        lambda: Flat([*flow()[:3], nn.Dropout2d(), *flow()[3:]], True),
        True,
        1,
    ),
    "timm-separable": (lambda: timm_block(DepthwiseSeparableConv, 8, 16), False, 1),
    "timm-separable-act": (lambda: timm_block(DepthwiseSeparableConv, pw_act=True), True, 1),
    "timm-frozen": (lambda: freeze_batch_norm_2d(timm_block()), True, 1),
    "timm-sync": (lambda: convert_sync_batchnorm(timm_block()), True, 1),
    "timm-same-stride1": (old_timm_same, True, 1),
    "timm-same-stride1-k5": (lambda: old_timm_same(kernel=5), True, 1),
    "timm-same-stride2": (lambda: old_timm_same(2, out_channels=16), False, 2),
    "timm-same-stride2-k5": (lambda: old_timm_same(2, 5, out_channels=16), False, 2),
    "timm-universal": (universal_block, True, 1),
    "timm-universal-k5-stride2": (
        lambda: universal_block(8, 16, stride=2, dw_kernel_size_mid=5, act_layer=nn.ReLU),
        False,
        2,
    ),
    "timm-universal-noskip": (
        lambda: universal_block(noskip=True),
        False,
        1,
    ),
    "timm-universal-feed-forward": (lambda: universal_block(dw_kernel_size_mid=0), True, 1),
    # Its input goes through another depthwise first, so that the op has no residual.
    "timm-universal-two-depthwise": (lambda: universal_block(dw_kernel_size_start=3), False, 1),
    "timm-universal-two-depthwise-stride2": (
        lambda: universal_block(8, 16, stride=2, dw_kernel_size_start=5, drop_path_rate=0.5),
        False,
        2,
    ),
    "timm-universal-convnext": (
        lambda: universal_block(dw_kernel_size_start=5, dw_kernel_size_mid=0),
        False,
        1,
    ),
    # The stride is that of the first depthwise.
    "timm-universal-convnext-stride2": (
        lambda: universal_block(8, 16, stride=2, dw_kernel_size_start=3, dw_kernel_size_mid=0),
        False,
        1,
    ),
    "timm-edge": (lambda: timm_block(EdgeResidual, exp_ratio=3.0, drop_path_rate=0.5), True, 1),
    "timm-edge-k5-stride2": (
        lambda: timm_block(EdgeResidual, 8, 16, exp_ratio=3.0, exp_kernel_size=5, stride=2),
        False,
        2,
    ),
    "timm-edge-same-stride2": (
        lambda: timm_block(EdgeResidual, 8, 16, exp_ratio=3.0, stride=2, pad_type="same"),
        False,
        2,
    ),
    "timm-conv-mlp": (lambda: ConvMlp(8, 24, act_layer=nn.GELU), False, 1),
    "torchvision-fused-mbconv": (lambda: fused_mbconv(3, 1, 8), True, 1),
    "torchvision-fused-mbconv-stride2": (lambda: fused_mbconv(4, 2, 16), False, 2),
    "timm-separable-layer": (lambda: SeparableConvNormAct(8, 16, 5), False, 1),
    "timm-separable-layer-no-norm": (lambda: SeparableConv2d(8, 16, stride=2), False, 2),
    "transformers": (transformers_block, True, 1),
    "transformers-stride2": (lambda: transformers_block(16, 2), False, 2),
    "transformers-dilated": (lambda: transformers_block(dilation=2), True, 1),
    "transformers-symmetric": (lambda: transformers_block(tf_padding=False), True, 1),
    "transformers-symmetric-stride2": (
        lambda: transformers_block(16, 2, tf_padding=False),
        False,
        2,
    ),
    "transformers-symmetric-dilated": (
        lambda: transformers_block(16, dilation=2, tf_padding=False),
        False,
        1,
    ),
    "transformers-relu": (lambda: transformers_block(hidden_act="relu"), True, 1),
    "mmcv": (mmcv_block, True, 1),
    "mmcv-stride2": (lambda: mmcv_block(stride=2, act=nn.ReLU), False, 2),
    "mmcv-t1": (lambda: mmcv_block(hidden=8), True, 1),
    "cvnets": (cvnets_block, True, 1),
    "cvnets-stride2": (lambda: cvnets_block(False, stride=2, kernel=5), False, 2),
    "cvnets-t1": (lambda: cvnets_block(hidden=8), True, 1),
    "smp-relu6": (lambda: smp_block(act=nn.ReLU6), True, 1),
    "smp-relu6-t1": (lambda: smp_block(1, image_size=16, act=nn.ReLU6), True, 1),
    "smp-relu6-no-skip": (lambda: smp_block(act=nn.ReLU6, id_skip=False), False, 1),
    "smp-relu6-stride2": (lambda: smp_block(stride=2, act=nn.ReLU6), False, 2),
    "lukemelas-dynamic": (lambda: lukemelas(image_size=None), True, 1),
    "lukemelas-dynamic-stride2": (lambda: lukemelas(8, 16, 3, 2, 5, None), False, 2),
    "sequential": (lambda: nn.Sequential(*flow(8, 24, 16)), False, 1),
    "sequential-residual-is-never-guessed": (lambda: nn.Sequential(*flow()), False, 1),
    "mobilenetv1": (lambda: mobilenet_v1_pair(nn.ReLU), False, 1),
    "mobilenetv1-stride2": (lambda: mobilenet_v1_pair(nn.ReLU6, stride=2), False, 2),
    "mobilenetv1-nested": (
        lambda: nn.Sequential(*map(ConvBNReLU, *[iter(mobilenet_v1_pair(nn.ReLU))] * 3)),
        False,
        1,
    ),
    "flat": (lambda: Flat(flow(), True), True, 1),
    "flat-flag-off": (lambda: Flat(flow(), False), False, 1),
    "flat-identity": (lambda: Flat(flow(), True, "identity"), True, 1),
    "flat-no-flag-stride2": (lambda: Flat(flow(stride=2), False, None), False, 2),
    "flat-no-flag-widening": (lambda: Flat(flow(8, 24, 16), False, None), False, 1),
    "flat-t1": (lambda: Flat(flow(8, 8, 8), True), True, 1),
    # tonylins' oldest file has an expansion at t = 1 too.
    "flat-t1-expanded": (
        lambda: Flat([*conv_norm_act(8, 8), *flow(8, 8, 8)], True),
        True,
        1,
    ),
    "flat-same": (lambda: Flat(flow(kernel=5, padding="same"), True), True, 1),
    "flat-valid": (lambda: Flat(flow(padding="valid"), False), False, 1),
    "flat-pad-hw": (lambda: Flat(flow(padding=(1, 0)), False), False, 1),
    "flat-k7": (lambda: Flat(flow(kernel=7), True), True, 1),
    "flat-k7-stride2": (lambda: Flat(flow(kernel=7, stride=2), False), False, 2),
    "flat-dilated-by-5": (lambda: Flat(flow(padding=5, dilation=5), True), True, 1),
    "flat-dilated": (lambda: Flat(flow(padding=2, dilation=2), True), True, 1),
    "flat-hardtanh": (lambda: Flat(flow(act=lambda: nn.Hardtanh(-1, 2)), True), True, 1),
    "flat-no-activation": (lambda: Flat(flow(act=None), True), True, 1),
    "flat-prefolded": (prefolded, True, 1),
    "zero-pad-stride2": (lambda: padded(2, (0, 1, 0, 1)), False, 2),
    "zero-pad-one-sided": (lambda: padded(1, (2, 0, 1, 1)), False, 1),
    "nested": (lambda: Nested(flow(), True), True, 1),
    "nested-stride2": (lambda: Nested(flow(8, 24, 16, 2), False), False, 2),
    "nested-t1": (lambda: Nested(flow(8, 8, 8), True), True, 1),
    "lukemelas": (lukemelas, True, 1),
    "lukemelas-t1": (lambda: lukemelas(8, 16, 1), False, 1),
    "lukemelas-no-skip": (lambda: lukemelas(id_skip=False), False, 1),
    "lukemelas-stride2-even": (lambda: lukemelas(8, 16, 3, 2, 3, 16), False, 2),
    "lukemelas-stride2-odd": (lambda: lukemelas(8, 16, 3, 2, 5, 15), False, 2),
    # What only its forward says.
    "torchvision-quantizable": (lambda: QuantizableInvertedResidual(8, 8, 1, 6), True, 1),
    "kuangliu": (lambda: Kuangliu(8, 24, 8, 1), True, 1),
    "kuangliu-stride2": (lambda: Kuangliu(8, 24, 16, 2), False, 2),
    "timm-drop-in-norm": (norm_with_drop, True, 1),
    "timm-same-stride2-dilated": (
        lambda: edited(
            timm_block(out_channels=16),
            "conv_dw",
            Conv2dSame(24, 24, 3, stride=2, dilation=2, groups=24),
        ),
        False,
        2,
    ),
    "flat-padding-before-the-expansion": (
        lambda: Flat([nn.ZeroPad2d(1), *flow(padding=0)], False),
        False,
        1,
    ),
    "flat-opaque-layer": (lambda: Flat([*flow()[:3], Opaque(*flow()[3:])], True), True, 1),
    "flat-child-that-does-not-run": (
        lambda: flat_changed(lambda b: b.add_module("shortcut", nn.Identity())),
        True,
        1,
    ),
    "flat-parameter-that-is-not-used": (own_parameter, True, 1),
    "flat-flag-nobody-reads": (
        lambda: flat_changed(lambda b: setattr(b, "has_skip", False)),
        True,
        1,
    ),
    "flat-no-flag-residual": (lambda: WithoutFlag(flow()), True, 1),
    "functional": (lambda: Functional(8, 24, 8), True, 1),
}


def fused_of(block, **settings):
    """The block fused: it must be one block."""
    (row,) = mk.explain(block)
    assert (row.name, row.state) == ("", "fusable")
    return mk.fuse(block, **settings)


def calls_that_ran():
    return sum(ran().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", RECOGNISED)
def test_recognised_block_is_computed_as_written(name, dtype):
    build, residual, stride = RECOGNISED[name]
    block = randomise(build()).to(dtype)
    fused = fused_of(block, backend="reference" if dtype == torch.float64 else None)
    (row,) = mk.explain(fused)
    assert (row.config.residual, row.config.stride) == (residual, stride)
    before = calls_that_ran()
    for height, width in SIZES:
        # Large enough for the upper clips to matter.
        x = 4 * torch.randn(2, 8, height, width, dtype=dtype)
        with torch.no_grad():
            difference = largest_difference(fused(x), block(x))
        assert difference < (1e-12 if dtype == torch.float64 else 2e-5)
    assert calls_that_ran() == before + len(SIZES)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", RECOGNISED)
def test_gradients_are_those_of_the_block(name, training):
    """To the bit with the statistics of a batch, and with the same random numbers."""
    block = randomise(RECOGNISED[name][0]()).double().train(training)
    exact = training and any(isinstance(m, _BatchNorm) for m in block.modules())
    fused = fused_of(block, backend="reference")
    x = 4 * torch.randn(2, 8, 9, 12, dtype=torch.float64)
    results = []
    for module in (fused, block):
        torch.manual_seed(1)
        own = x.clone().requires_grad_()
        y = module(own)
        y.square().mean().backward()
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        results.append({"y": y, "x": own.grad, **grads} | dict(module.named_buffers()))
    found, expected = results
    assert list(found) == list(expected)
    for what, tensor in expected.items():
        same = partial(torch.allclose, rtol=1e-7, atol=1e-9 * max(1, tensor.abs().max().item()))
        assert (torch.equal if exact else same)(found[what], tensor), what


def test_every_layer_of_a_recognised_block_counts():
    """Each tensor changes the result, so that the comparison above can fail by each of them."""
    block = randomise(TorchvisionBlock(8, 8, 1, 6)).double()
    x = 4 * torch.randn(1, 8, 6, 6, dtype=torch.float64)
    before = block(x)
    for name, tensor in block.state_dict().items():
        if not tensor.is_floating_point():
            continue
        changed = copy.deepcopy(block)
        changed.state_dict()[name].mul_(1.01)
        assert largest_difference(mk.fuse(changed, backend="reference")(x), before) > 1e-5


def test_batch_norm_activation_is_read():
    weights = mk.fold(timm_block(DepthwiseSeparableConv, pw_act=True, act_layer=nn.ReLU))
    assert weights.clip_dw == weights.clip_project == (0.0, inf)


def test_two_activations_may_differ():
    block = Flat(flow(), True)
    block.conv[2] = nn.ReLU()
    weights = mk.fold(block)
    assert (weights.clip_expand, weights.clip_dw) == ((0.0, inf), (0.0, 6.0))


@pytest.mark.parametrize(
    ("size", "kernel", "padding"),
    [(16, 3, (0, 0, 1, 1)), (15, 3, (1, 1, 1, 1)), (16, 5, (1, 1, 2, 2)), (15, 5, (2, 2, 2, 2))],
)
def test_lukemelas_padding_is_that_of_the_image_size(size, kernel, padding):
    (row,) = mk.explain(lukemelas(8, 16, 3, 2, kernel, size))
    assert row.config.padding == padding
