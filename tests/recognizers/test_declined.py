"""Which blocks look like an inverted residual but cannot be fused exactly, and why."""

import re
from functools import partial

import pytest
import torch
import torchvision
from declined_blocks import (
    OddDropout,
    OddNorm,
    OddReLU,
    Scale,
    ScaledConvolution,
    edited_padding,
    flat_changed,
    flat_lazy,
    flat_with,
    norm_last,
    old_weight_normed,
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
    flow,
    largest_difference,
    old_timm_same,
    timm_block,
    transformers_block,
    universal_block,
)
from same_answers import randomise
from timm.layers import EffectiveSEModule
from timm.models._efficientnet_blocks import (
    CondConvResidual,
    EdgeResidual,
    SqueezeExcite,
)
from torch import nn
from torchvision.models.efficientnet import FusedMBConv as TorchvisionFusedMBConv
from torchvision.models.efficientnet import FusedMBConvConfig
from torchvision.models.resnet import BasicBlock

import mnv2_kernels as mk
from mnv2_kernels.modules.fused_module import FusedModule

pytestmark = pytest.mark.usefixtures("one_thread")


class Does(Flat):
    """Calls a function besides what it computes."""

    def __init__(self, function, *args):
        super().__init__(flow(), True)
        self.function, self.args = function, args

    def forward(self, x):
        self.function(*self.args)
        return super().forward(x)


class Counts(Flat):
    def __init__(self):
        super().__init__(flow(), True)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class DependsOnValues(Flat):
    def forward(self, x):
        return super().forward(x) if x.max() > 1 else x


# Blocks of which no part runs in one pass, and the reason.
DECLINED = {
    "timm gate by tanh": (
        lambda: timm_block(se_layer=partial(SqueezeExcite, gate_layer=nn.Tanh)),
        r"tanh is not supported, in se.gate \(Tanh\)",
    ),
    "timm gate of one layer": (
        lambda: timm_block(se_layer=EffectiveSEModule),
        r"fully connected layers or 1x1 convolutions, got one, in se \(EffectiveSEModule\)",
    ),
    "timm anti-aliasing": (
        lambda: timm_block(stride=2, aa_layer=partial(nn.AvgPool2d, 2)),
        r"its average pool is not over all pixels, in aa \(AvgPool2d\)",
    ),
    "timm space to depth": (lambda: timm_block(s2d=1), "two results of one shape"),
    "timm Mish": (lambda: timm_block(act_layer=nn.Mish), r"mish is not .* in bn1.act \(Mish\)"),
    "timm SAME at stride 2 with a residual": (
        lambda: old_timm_same(stride=2),
        "it adds something else than two results of one shape",
    ),
    "timm 3x3 projection": (
        lambda: timm_block(pw_kernel_size=3),
        "its shortcut must go around one block, got",
    ),
    "timm universal, depthwise last": (
        lambda: universal_block(dw_kernel_size_end=3),
        "its shortcut must go around one block, got",
    ),
    "timm universal, layer scale": (
        lambda: universal_block(layer_scale_init_value=0.1),
        r"it multiplies by something, in layer_scale \(LayerScale2d\)",
    ),
    "timm universal, anti-aliasing": (
        lambda: universal_block(8, 16, stride=2, aa_layer=nn.AvgPool2d),
        "its average pool is not over all pixels",
    ),
    "transformers padded twice": (
        lambda: edited_padding(transformers_block()),
        "it adds something else than two results of one shape",
    ),
    "cvnets, mish": (lambda: cvnets_block(act=nn.Mish), "mish is not supported"),
    "kuangliu convolution shortcut": (
        lambda: Kuangliu(8, 24, 16, 1),
        "its forward is no chain: a result is used twice, or not at all",
    ),
    "Mish": (lambda: Flat(flow(act=nn.Mish), True), r"mish is not .* in conv.2 \(Mish\)"),
    "forward hook": (lambda: with_hook("register_forward_hook"), "conv.3 .* has hooks"),
    "forward pre-hook": (lambda: with_hook("register_forward_pre_hook"), "conv.3 .* has hooks"),
    "backward hook": (lambda: with_hook("register_full_backward_hook"), "conv.3 .* has hooks"),
    "reflected padding": (
        lambda: Flat(flow(padding_mode="reflect"), True),
        "its padding is reflect and not of zeros",
    ),
    "kernel 9": (lambda: Flat(flow(kernel=9), True), r"in \(3, 5, 7\), got \(9, 9\)"),
    "stride 3": (lambda: Flat(flow(stride=3), False), r"stride in \(1, 2\), got \(3, 3\)"),
    "uneven stride": (lambda: Flat(flow(stride=(1, 2)), False), r"got \(1, 2\)"),
    "dilation 73": (lambda: Flat(flow(padding=73, dilation=73), True), "at most 72 rows"),
    "uneven dilation": (lambda: Flat(flow(dilation=(1, 2)), False), r"columns, got \(1, 2\)"),
    "too much padding": (lambda: Flat(flow(padding=3), False), "padding must be from 0 to 2"),
    "grouped projection": (
        lambda: flat_with(6, nn.Conv2d(24, 8, 1, groups=2)),
        "its shortcut must go around one block, got",
    ),
    "channels do not match": (
        lambda: flat_with(6, nn.Conv2d(12, 8, 1)),
        "a convolution of 12 channels is given 24",
    ),
    "dtypes do not match": (
        lambda: flat_changed(lambda b: b.conv[3].double()),
        "a convolution of torch.float64 is given torch.float32",
    ),
    "complex": (lambda: Flat(flow(), True).to(torch.complex64), "no parameters that are real"),
    "sparse": (sparse, "is not dense"),
}

# Declined blocks with a part that is one, which part, and the reason.
PARTLY = {
    "subclassed ReLU6": (
        lambda: flat_with(2, OddReLU()),
        "conv[3:8]",
        r"it computes x \+ 1, which is",
    ),
    "two activations": (
        lambda: Flat([*flow()[:3], nn.ReLU(), *flow()[3:]], True),
        "conv[4:9]",
        "a clip follows a clip",
    ),
    "group norm": (
        lambda: flat_with(1, nn.GroupNorm(2, 24)),
        "conv[3:8]",
        "group_norm is not supported",
    ),
    "instance norm": (
        lambda: flat_with(1, nn.InstanceNorm2d(24)),
        "conv[3:8]",
        "instance_norm is not supported",
    ),
    "subclassed norm": (
        lambda: flat_with(1, OddNorm(24)),
        "conv[3:8]",
        r"clamp\(2 \* x, 0, 6\), which",
    ),
    "two norms": (
        lambda: Flat([*flow()[:2], nn.BatchNorm2d(24), *flow()[2:]], True),
        "conv[4:9]",
        "a batch norm follows another one",
    ),
    "norm after activation": (norm_last, "conv[3:8]", "a norm follows a clip"),
    "no running statistics": (
        lambda: flat_with(1, nn.BatchNorm2d(24, track_running_stats=False)),
        "conv[3:8]",
        "batch norm has no running statistics",
    ),
    "norm of other size": (
        lambda: flat_with(1, nn.BatchNorm2d(12)),
        "conv[3:8]",
        "a batch norm of 12 channels is given 24",
    ),
    "norm of one channel": (
        lambda: flat_with(1, nn.BatchNorm2d(1)),
        "conv[3:8]",
        "a batch norm of 1 channels is given 24",
    ),
    "norm of another dtype": (
        lambda: flat_with(1, nn.BatchNorm2d(24).half()),
        "conv[3:8]",
        "a batch norm of torch.float16 is given torch.float32",
    ),
    "subclassed dropout": (
        lambda: Flat([*flow(), OddDropout(0.1)], True),
        "conv[0:8]",
        r"it computes 2 \* x, .* in conv.8 \(OddDropout\)",
    ),
    "parametrized": (weight_normed, "conv[3:8]", "conv.0 .* is parametrized"),
    "old weight norm": (old_weight_normed, "conv[3:8]", "conv.0 .* has hooks"),
    "quantisation-aware": (qat_conv, "conv[3:8]", "weight that its forward uses is computed"),
    "quantised": (
        lambda: flat_with(0, torch.ao.nn.quantized.Conv2d(8, 24, 1)),
        "conv[3:8]",
        r"in conv.0 \(quantised Conv2d\)",
    ),
    "subclassed convolution": (
        lambda: flat_with(0, Scale(8, 24, 1)),
        "conv[3:8]",
        r"it computes 2 \* x, .* in conv.0 \(Scale\)",
    ),
    "subclassed _conv_forward": (
        lambda: flat_with(0, ScaledConvolution(8, 24, 1)),
        "conv[3:8]",
        r"it computes 2 \* x, .* in conv.0 \(ScaledConvolution\)",
    ),
    "flag against stride": (lambda: Flat(flow(stride=2), True), "conv", "results of one shape"),
    "flag against channels": (
        lambda: Flat(flow(8, 24, 16), True),
        "conv",
        "it adds something else than two results of one shape",
    ),
    "flag against size": (lambda: Flat(flow(padding=0), True), "conv", "results of one shape"),
    "strided expansion": (
        lambda: Flat([nn.Conv2d(8, 24, 1, 2), *flow()[1:]], False),
        "conv[3:8]",
        "expected one inverted residual, found a 1x1 convolution, a block 24x24x8-s1-k3",
    ),
    "padding at the end": (
        lambda: Flat([*flow(), nn.ZeroPad2d(1)], False),
        "conv[0:8]",
        "padding after the last",
    ),
    "padding before a norm": (
        lambda: Flat([*flow()[:1], nn.ZeroPad2d(1), *flow()[1:]], False),
        "conv[4:9]",
        "a norm comes between zero padding and a convolution",
    ),
    "four convolutions": (
        lambda: Flat([*flow(), *conv_norm_act(8, 8)], False),
        "conv[0:8]",
        "found a block 8x24x8-s1-k3, a 1x1 convolution",
    ),
    "prints": (lambda: Does(print, "hello"), "conv", "it calls print"),
    "counts its calls": (Counts, "conv", "changes the attribute calls"),
    "depends on values": (
        lambda: DependsOnValues(flow(), True),
        "conv",
        "max is not supported",
    ),
    "replaced forward": (
        lambda: replaced_forward(""),
        "conv",
        "the forward of this very module has been replaced",
    ),
    "replaced inner forward": (
        lambda: replaced_forward("conv.0"),
        "conv[3:8]",
        "the forward of conv.0 .* has been replaced",
    ),
}


def outcome(module, x):
    """What a call gives, or the error that it raises."""
    try:
        with torch.no_grad():
            return module(x)
    except Exception as error:
        return type(error), str(error)


def why_not_folded(block):
    """Says of any module why it is no block."""
    with pytest.raises(
        ValueError, match=f"^fold: {type(block).__name__} cannot be folded: "
    ) as raised:
        mk.fold(block)
    return str(raised.value)


@pytest.mark.parametrize("name", DECLINED)
def test_declined_with_the_reason(name):
    build, reason = DECLINED[name]
    block = build().eval()
    assert re.search(reason, why_not_folded(block))
    (row,) = mk.explain(block)
    assert (row.name, row.state) == ("", "declined")
    assert re.search(reason, row.reason)
    # And nothing is done to it.
    assert mk.fuse(block, inplace=True) is block
    assert not any(isinstance(m, FusedModule) for m in block.modules())


@pytest.mark.parametrize("name", PARTLY)
def test_part_of_a_declined_block_is_fused(name):
    """The reason is the one that `fold` gives; `explain` and `fuse` find what is inside."""
    build, part, reason = PARTLY[name]
    block = randomise(build())
    assert re.search(reason, why_not_folded(block))
    (row,) = mk.explain(block)
    assert (row.name, row.state) == (part, "fusable")
    x = torch.randn(2, 8, 9, 10)
    z = outcome(block, x)
    fused = mk.fuse(block, inplace=True)
    (row,) = mk.explain(fused)
    assert (row.name, row.state) == (part, "fused")
    y = outcome(fused, x)
    if isinstance(z, tuple):
        assert y == z
    else:
        assert largest_difference(y, z) < 1e-5


@pytest.mark.parametrize(
    "build", [flat_lazy, lambda: flat_with(1, nn.LazyBatchNorm2d())], ids=["convolution", "norm"]
)
def test_a_layer_without_its_tensors_yet(build):
    x = torch.randn(2, 8, 9, 10)
    results = []
    for does in (lambda block: block, partial(mk.fuse, inplace=True)):
        torch.manual_seed(1)
        block = build().eval()
        assert "has hooks" in why_not_folded(block)
        block = does(block)
        results.append(outcome(block, x))
    torch.testing.assert_close(*results)
    # Now it has them.
    (row,) = mk.explain(mk.unfuse(block))
    assert (row.name, row.state) == ("", "fusable")


@pytest.mark.parametrize(
    "module",
    [
        BasicBlock(8, 8),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        ConvBNReLU(*conv_norm_act(8, 8)),
        Flat(conv_norm_act(8, 8, 3), True),
        timm_block(group_size=8),
        # It does not expand; the next one has a gate, and the one after that no activation.
        TorchvisionFusedMBConv(FusedMBConvConfig(1, 3, 1, 8, 8, 1), 0.1, nn.BatchNorm2d),
        timm_block(EdgeResidual, exp_ratio=3.0, se_layer=SqueezeExcite),
        timm_block(EdgeResidual, exp_ratio=3.0, act_layer=nn.Identity),
        timm_block(CondConvResidual, exp_ratio=3.0, num_experts=2),
        nn.ModuleList(flow()),
    ],
    ids=lambda m: type(m).__name__,
)
def test_something_else_is_not_mentioned(module):
    assert not mk.explain(module)
    why_not_folded(module)


def test_a_network_is_no_block():
    """Its `layers` holds depthwise convolutions too; its blocks are found inside."""
    network = torchvision.models.mnasnet0_5()
    why_not_folded(network)
    assert len(mk.explain(network)) == 17
