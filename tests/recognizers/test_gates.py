"""Which squeeze-excite is read, however it is written, and which is not."""

import re
from functools import partial

import pytest
import torch
from foreign_blocks import (
    conv_norm_act,
    edited,
    flow,
    largest_difference,
    lukemelas,
    mobile_vit_block,
    smp_block,
    timm_block,
    v3,
)
from same_answers import randomise
from squeeze_excite import Gated, MobileNetV3Block, SELayer, Written, reference_of
from timm.layers import EffectiveSEModule
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, SqueezeExcite
from torch import nn
from torch.nn import functional as F
from torchvision.models.efficientnet import MBConv, MBConvConfig
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation

from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6
from mnv2_kernels.fuse.find import find
from mnv2_kernels.recognizers import Declined, block_of, read

pytestmark = pytest.mark.usefixtures("one_thread")


def itself(y, gate):
    """For a gate that multiplies by itself."""
    return gate(y)


def two(gate, y, mean=None):
    """What is before the sigmoid: by convolutions."""
    mean = y.mean((2, 3), keepdim=True) if mean is None else mean
    return gate.second(F.relu(gate.first(mean)))


def by_vectors(gate, y):
    return gate.second(F.silu(gate.first(torch.mean(y, (-2, -1)))))


def normed(gate, y):
    y = gate.norm(gate.first(F.adaptive_avg_pool2d(y, (1, 1))))
    return torch.sigmoid_(gate.second(F.relu6(y, inplace=True)))


def in_place(y, gate):
    return y.mul_(gate(y))


def sized(gate, y):
    b, c, h, w = y.shape
    pooled = F.avg_pool2d(y, (h, w)).reshape(-1, c)
    return gate.second(gate.first(pooled).relu_()).view(b, -1, 1, 1).sigmoid()


def separable():
    return timm_block(DepthwiseSeparableConv, se_layer=SqueezeExcite)


def mbconv():
    return MBConv(MBConvConfig(3, 3, 1, 8, 8, 1), 0.5, nn.BatchNorm2d)


def frozen():
    gate = Written(normed)
    gate.norm = FrozenBatchNorm2d(6)
    return Gated(gate)


def written(gate, around=lambda y, gate: y * gate(y), make=None, **settings):
    make = make or (lambda i, o: nn.Conv2d(i, o, 1))
    return Gated(Written(gate, make), around, **settings)


# Blocks, what follows their depthwise and their squeeze, and their scale.
RECOGNISED = {
    "torchvision V3": (lambda: v3(se=True), RELU, RELU, "hardsigmoid"),
    "torchvision V3, hard swish": (
        lambda: v3(se=True, act="HS", kernel=5),
        "hardswish",
        RELU,
        "hardsigmoid",
    ),
    "torchvision V3, no expansion": (lambda: v3(8, se=True), RELU, RELU, "hardsigmoid"),
    "torchvision MBConv": (mbconv, "silu", "silu", "sigmoid"),
    "timm": (lambda: timm_block(se_layer=SqueezeExcite), RELU6, RELU6, "sigmoid"),
    "timm, GELU": (
        lambda: timm_block(se_layer=SqueezeExcite, act_layer=nn.GELU),
        "gelu",
        "gelu",
        "sigmoid",
    ),
    "timm, separable": (separable, RELU6, RELU6, "sigmoid"),
    "lukemelas": (lambda: lukemelas(se_ratio=0.25), RELU6, RELU6, "sigmoid"),
    "smp": (lambda: smp_block(se_ratio=0.25), "silu", "silu", "sigmoid"),
    "d-li14": (lambda: MobileNetV3Block(se_first=False), "hardswish", RELU, "hardsigmoid"),
    "d-li14, no expansion": (
        lambda: MobileNetV3Block(se_first=False, hidden=8),
        "hardswish",
        RELU,
        "hardsigmoid",
    ),
    "SELayer": (lambda: Gated(SELayer(), itself), RELU6, RELU, "hardsigmoid"),
    "SqueezeExcitation": (
        lambda: Gated(SqueezeExcitation(24, 4), itself),
        RELU6,
        RELU,
        "sigmoid",
    ),
    "convolutions": (lambda: written(lambda g, y: two(g, y).sigmoid()), RELU6, RELU, "sigmoid"),
    "the other way round": (
        lambda: written(lambda g, y: two(g, y).sigmoid(), lambda y, gate: gate(y) * y),
        RELU6,
        RELU,
        "sigmoid",
    ),
    "in place": (
        lambda: written(lambda g, y: F.hardsigmoid(two(g, y)), in_place),
        RELU6,
        RELU,
        "hardsigmoid",
    ),
    "hard sigmoid of numbers": (
        lambda: written(lambda g, y: torch.clamp(two(g, y) / 6 + 0.5, 0, 1)),
        RELU6,
        RELU,
        "hardsigmoid",
    ),
    "vectors": (
        lambda: written(
            lambda g, y: torch.sigmoid(by_vectors(g, y))[:, :, None, None], make=nn.Linear
        ),
        RELU6,
        "silu",
        "sigmoid",
    ),
    "vectors without biases": (
        lambda: written(
            lambda g, y: torch.sigmoid(by_vectors(g, y).unsqueeze(-1).unsqueeze(-1)),
            lambda y, gate: torch.mul(y, gate(y).expand_as(y)),
            partial(nn.Linear, bias=False),
        ),
        RELU6,
        "silu",
        "sigmoid",
    ),
    "sizes": (lambda: written(sized, make=nn.Linear), RELU6, RELU, "sigmoid"),
    "norm": (lambda: written(normed), RELU6, RELU6, "sigmoid"),
    "frozen norm": (frozen, RELU6, RELU6, "sigmoid"),
    "no activation": (
        lambda: written(lambda g, y: g.second(g.first(y.mean((2, 3), True))).sigmoid()),
        RELU6,
        NO_CLIP,
        "sigmoid",
    ),
    "a copy is averaged": (
        lambda: written(lambda g, y: two(g, y.clone()).sigmoid()),
        RELU6,
        RELU,
        "sigmoid",
    ),
    "a copy is multiplied": (
        lambda: written(
            lambda g, y: two(g, y).sigmoid(), lambda y, gate: y.contiguous().mul(gate(y))
        ),
        RELU6,
        RELU,
        "sigmoid",
    ),
    "dropout": (
        lambda: written(lambda g, y: F.dropout(two(g, y), 0.5, g.training).sigmoid()),
        RELU6,
        RELU,
        "sigmoid",
    ),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_block_with_a_gate(name):
    build, after, squeeze, scale = RECOGNISED[name]
    block = randomise(build()).double()
    for size in ((9, 12), (16, 16)):
        x = 4 * torch.randn(2, 8, *size, dtype=torch.float64)
        layers = block_of(read(block, x.shape))
        assert layers.depthwise.clip == after
        assert (layers.gate.squeeze.clip, layers.gate.scale) == (squeeze, scale)
        assert layers.config.residual
        with torch.no_grad():
            assert largest_difference(reference_of(layers, x), block(x)) < 1e-10


def test_mobile_vit_has_curves():
    block = randomise(mobile_vit_block()).double()
    x = torch.randn(2, 8, 9, 12, dtype=torch.float64)
    layers = block_of(read(block, x.shape))
    assert layers.clips == ("silu", "silu", NO_CLIP) and layers.gate is None
    with torch.no_grad():
        assert largest_difference(reference_of(layers, x), block(x)) < 1e-10


class Around(nn.Module):
    """A gate that is somewhere in a block: `forward` is a function of the block and x."""

    def __init__(self, function):
        super().__init__()
        self.expand = nn.Sequential(*conv_norm_act(8, 24))
        self.depthwise = nn.Sequential(*conv_norm_act(24, 24, 3, 1, 24))
        self.project = nn.Sequential(*conv_norm_act(24, 8, act=None))
        self.wide, self.narrow = SELayer(24), SELayer(8)
        self.of_input = Written(lambda g, x: g.second(F.relu(g.first(x.mean((2, 3), True)))))
        self.of_input.first = nn.Conv2d(8, 6, 1)
        self.function = function

    def forward(self, x):
        return x + self.function(self, x)


def activation_between(y, gate):
    scale = gate(y)
    return F.relu(y, inplace=True) * scale


def twice(y, gate):
    scale = gate(y)
    return y * scale * scale


PLACE = "a gate must come between the depthwise and the projection, got it "
OTHER = "a gate must multiply the value that was averaged, got another one"
TWO = "a gate must be the sigmoid of two fully connected layers or 1x1 convolutions, got "
conv_gate = partial(Written, lambda g, y: two(g, y).sigmoid())
DECLINED = {
    "d-li14's order": (MobileNetV3Block, PLACE + "before the activation of the depthwise"),
    "before the norm": (
        lambda: Around(
            lambda m, x: m.project(m.depthwise[1:](m.wide(m.depthwise[0](m.expand(x)))))
        ),
        PLACE + "before the norm of the depthwise",
    ),
    "after the expansion": (
        lambda: Around(lambda m, x: m.project(m.depthwise(m.wide(m.expand(x))))),
        PLACE + "after a 1x1 convolution",
    ),
    "after the projection": (
        lambda: Around(lambda m, x: m.narrow(m.project(m.depthwise(m.expand(x))))),
        PLACE + "after a 1x1 convolution",
    ),
    "after the sum": (
        lambda: nn.Sequential(Around(lambda m, x: m.project(m.expand(x))), SELayer(8)),
        "a gate follows something else than a convolution",
    ),
    "of the input": (
        lambda: Around(lambda m, x: m.project(m.depthwise(m.expand(m.narrow(x))))),
        "a gate comes before the first convolution",
    ),
    "without depthwise": (
        lambda: Around(lambda m, x: m.project(m.wide(m.expand(x)))),
        PLACE + "after a 1x1 convolution",
    ),
    "without projection": (
        lambda: nn.Sequential(*flow()[:-2], SELayer(24)),
        "a gate must come between the depthwise and the projection, got no projection after it",
    ),
    "after a 3x3 convolution": (
        lambda: nn.Sequential(*conv_norm_act(8, 24, 3), SELayer(24), nn.Conv2d(24, 8, 1)),
        PLACE + "after a 3x3 convolution",
    ),
    "two": (lambda: Gated(nn.Sequential(SELayer(), SELayer()), itself), "a gate follows another"),
    "multiplied twice": (lambda: Gated(conv_gate(), twice), OTHER),
    "computed from the input": (
        lambda: Around(lambda m, x: m.project(m.depthwise(m.expand(x)) * m.of_input(x).sigmoid())),
        OTHER,
    ),
    "activation in between": (lambda: Gated(conv_gate(), activation_between), OTHER),
    "activation only where it is averaged": (
        lambda: Gated(conv_gate(), lambda y, gate: y * gate(F.relu(y))),
        OTHER,
    ),
    "means of rows": (
        lambda: written(lambda g, y: two(g, y, y.mean(2, keepdim=True)).sigmoid()),
        "its mean is not over all pixels",
    ),
    "maximum": (
        lambda: written(lambda g, y: two(g, y, F.adaptive_max_pool2d(y, 1)).sigmoid()),
        "max_pool2d is not supported",
    ),
    "largest number": (
        lambda: written(lambda g, y: two(g, y, y.amax((2, 3), keepdim=True)).sigmoid()),
        "amax is not supported",
    ),
    "of every pixel": (
        lambda: written(lambda g, y: two(g, y, y).sigmoid()),
        "a gate must begin with means over all pixels, found clip in their place",
    ),
    "of every pixel, averaged later": (
        lambda: written(lambda g, y: two(g, y, y).mean((2, 3), keepdim=True).sigmoid()),
        TWO + "none",
    ),
    "no layers": (
        lambda: Gated(nn.Identity(), lambda y, gate: y * y.mean((2, 3), True).sigmoid()),
        TWO + "none",
    ),
    "one layer": (lambda: Gated(EffectiveSEModule(24), itself), TWO + "one"),
    "three layers": (
        lambda: written(lambda g, y: g.second(F.relu(g.first(two(g, y)))).sigmoid()),
        "a gate must begin with means over all pixels, found convolution in their place",
    ),
    "clip before the sigmoid": (
        lambda: written(lambda g, y: F.relu(two(g, y)).sigmoid()),
        TWO + "none",
    ),
    "groups": (
        lambda: written(
            lambda g, y: two(g, y).sigmoid(), make=partial(nn.Conv2d, kernel_size=1, groups=2)
        ),
        TWO + "none",
    ),
    "one number": (
        lambda: edited(Gated(conv_gate()), "gate.second", nn.Conv2d(6, 1, 1)),
        "a gate must have a number for each channel of (2, 24, 9, 12), got (2, 1, 1, 1)",
    ),
    "widths do not match": (
        lambda: edited(Gated(conv_gate()), "gate.second", nn.Conv2d(7, 24, 1)),
        "a convolution of 7 channels is given 6",
    ),
    "softmax": (
        lambda: written(lambda g, y: two(g, y).softmax(1)),
        "softmax is not supported",
    ),
    "tanh": (lambda: written(lambda g, y: two(g, y).tanh()), "tanh is not supported"),
    "no sigmoid": (lambda: written(two), "it multiplies two results, of which none is a gate"),
    "scaled sigmoid": (
        lambda: written(lambda g, y: 2 * two(g, y).sigmoid()),
        "it multiplies two results, of which none is a gate",
    ),
    "other hard sigmoid": (
        lambda: written(lambda g, y: (0.2 * two(g, y) + 0.5).clamp(0, 1)),
        "it multiplies two results, of which none is a gate",
    ),
    "added": (
        lambda: Gated(conv_gate(), lambda y, gate: y + gate(y)),
        "it adds something else than two results of one shape",
    ),
    "added where it fits": (
        lambda: Gated(conv_gate(), lambda y, gate: y + gate(y).expand_as(y)),
        "a sigmoid must be a part of a gate or of SiLU, got it alone",
    ),
    "means used twice": (
        lambda: Gated(conv_gate(), lambda y, gate: y * gate(y) + y),
        "it adds something else than the input of a block to its result",
    ),
    "gate in place": (
        lambda: Gated(conv_gate(), lambda y, gate: gate(y).expand_as(y).clone().mul_(y)),
        "a gate is changed in place",
    ),
    "dropout in training mode": (
        lambda: written(lambda g, y: F.dropout(two(g, y), 0.5).sigmoid()),
        "dropout is in training mode",
    ),
    "lukemelas' function with a gradient of its own": (
        lambda: lukemelas(se_ratio=0.25, relu_fn="swish"),
        "a part of its forward runs without gradients, in _swish",
    ),
    "detached": (
        lambda: written(lambda g, y: two(g, y.detach()).sigmoid()),
        "detach is not supported",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_gate(name):
    build, reason = DECLINED[name]
    with pytest.raises(Declined, match=re.escape(reason)):
        block_of(read(build().eval(), (2, 8, 9, 12)))


def test_gate_among_the_children_of_a_sequential():
    """A run of children that is a block, as in a network without a module for each block."""
    layers = [*conv_norm_act(8, 8, 3), nn.MaxPool2d(2), *flow()[:-2], SqueezeExcitation(24, 4)]
    model = nn.Sequential(*layers, *conv_norm_act(24, 8, act=None), nn.Tanh()).eval()
    (found,) = find(model)
    assert found.span == (4, 13)
    assert found.reading.layers[0].gate.squeeze.conv is model[10].fc1
