"""Which activations are read, in whichever way they are written, and which are not."""

import re

import pytest
import torch
from foreign_blocks import Flat, conv_norm_act, flow, largest_difference
from same_answers import randomise
from squeeze_excite import HardSigmoid, HardSwish, reference_of
from timm.layers import activations as timm_activations
from torch import nn
from torch.nn import functional as F

from mnv2_kernels.recognizers import Declined, LinearLayer, block_of, read
from mnv2_kernels.recognizers.formulas import HARDSIGMOID, HARDSWISH, Formula

pytestmark = pytest.mark.usefixtures("one_thread")


class Act(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class HSigmoid(nn.Module):
    """HSigmoid of mmcv, with the numbers of MobileNetV3."""

    def forward(self, x):
        return ((x + 3.0) / 6.0).clamp_(0.0, 1.0)


SPELLINGS = {
    "silu": (
        F.silu,
        lambda x: F.silu(x, inplace=True),
        lambda x: x * torch.sigmoid(x),
        lambda x: x.sigmoid() * x,
        lambda x: torch.mul(x, F.sigmoid(x)),
        lambda x: x.mul_(x.sigmoid()),
        lambda x: x * torch.special.expit(x),
        timm_activations.Swish(inplace=True),
        timm_activations.Swish(),
    ),
    "hardswish": (
        F.hardswish,
        lambda x: F.hardswish(x, inplace=True),
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * F.relu6(3.0 + x, inplace=True) * (1 / 6),
        lambda x: x * (F.relu6(x + 3) / 6),
        lambda x: F.hardtanh(x + 3, 0.0, 6.0) * x / 6.0,
        lambda x: x * torch.clamp(x + 3, 0, 6) / 6,
        lambda x: x * F.hardsigmoid(x),
        lambda x: x.mul_(F.hardsigmoid(x)),
        lambda x: torch.div(torch.mul(x, torch.add(x, 3).clamp_(min=0, max=6)), 6),
        lambda x: x / 6 * F.relu6(x + 3),
        lambda x: x * (x / 6 + 0.5).clamp(0, 1),
        lambda x: x * (1 / 6 * x + 0.5).clamp(0, 1),
        lambda x: x * HSigmoid()(x),
        HardSwish(),
        timm_activations.HardSwish(inplace=True),
        timm_activations.HardSwish(),
    ),
    "gelu": (F.gelu, nn.GELU()),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU("tanh")),
}
CASES = [(name, act) for name, spellings in SPELLINGS.items() for act in spellings]


def block_with(act) -> nn.Module:
    return randomise(Flat(flow(act=lambda: Act(act)), True)).double()


@pytest.mark.parametrize(("name", "act"), CASES)
def test_curve_in_a_block(name, act):
    block = block_with(act)
    x = 4 * torch.randn(2, 8, 9, 7, dtype=torch.float64)
    layers = block_of(read(block, x.shape))
    assert layers.clips[:2] == (name, name)
    with torch.no_grad():
        assert largest_difference(reference_of(layers, x), block(x)) < 1e-10


DECLINED = {
    "other shift": (
        lambda x: x * F.relu6(x + 2) / 6,
        "it computes x * clamp(0.166667 * x + 0.333333, 0, 1), which is no activation",
    ),
    "other quotient": (lambda x: x * F.relu6(x + 3) / 5, "it computes x * clamp(0.2 * x + 0.6, 0"),
    "nearly a sixth": (lambda x: x * F.relu6(x + 3) * 0.1667, "it computes x * clamp(0.1667 * x"),
    "no quotient": (lambda x: x * F.relu6(x + 3), "it computes x * clamp(x + 3, 0, 6), which"),
    "other clip": (lambda x: x * F.relu(x + 3) / 6, "it computes x * clamp(0.166667 * x + 0.5, 0"),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), "a gate must be the sigmoid of two"),
    "sigmoid of a clip": (lambda x: x * F.relu(x).sigmoid(), "a gate must be the sigmoid of two"),
    "clip times sigmoid": (lambda x: F.relu(x) * x.sigmoid(), "a gate must be the sigmoid of two"),
    "of another value": (
        lambda x: x * F.relu6(F.relu(x) + 3) / 6,
        "it multiplies two results, of which none is a gate",
    ),
    "in place before the product": (
        lambda x: F.hardsigmoid(x, inplace=True) * x,
        "a gate must be the sigmoid of two",
    ),
    "cancelled": (
        lambda x: x * F.relu6(x + 1e9 + (-1e9) + 3) / 6,
        "it multiplies two results, of which none is a gate",
    ),
    "square": (lambda x: x * x, "it computes x * x, which is no activation"),
    "sigmoid": (torch.sigmoid, "a sigmoid must be a part of a gate or of SiLU, got it alone"),
    "hard sigmoid": (HardSigmoid(), "a hardsigmoid must be a part of a gate or of hard swish, got"),
    "twice": (lambda x: F.silu(F.silu(x)), "a silu follows a silu"),
    "curve after clip": (lambda x: F.gelu(F.relu(x)), "a gelu follows a clip"),
    "scaled": (lambda x: 0.5 * F.silu(x), "it computes 0.5 * x, which is no activation"),
    "negative": (lambda x: F.silu(x) * -1, "it multiplies by -1"),
    "by nothing": (lambda x: F.silu(x) / 0, "it divides by something else than a number"),
    "rounded": (
        lambda x: torch.div(x, 6, rounding_mode="floor"),
        "it divides by something else than a number",
    ),
    "part used twice": (
        lambda x: F.silu(x) + x.sigmoid(),
        "a sigmoid must be a part of a gate or of SiLU, got it alone",
    ),
    "mish": (F.mish, "mish is not supported"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_activation(name):
    act, reason = DECLINED[name]
    with pytest.raises(Declined, match=re.escape(reason)):
        read(block_with(act), (1, 8, 9, 7))


class EfficientSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.sigmoid() * (1 + x * (1 - x.sigmoid())))


def test_an_autograd_function_is_declined():
    with pytest.raises(Declined, match="a part of its forward runs without gradients"):
        read(block_with(EfficientSwish.apply), (1, 8, 9, 7))


def test_curves_outside_of_blocks():
    """After the stem, a 1x1 convolution, and fully connected layers."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 12, 1), nn.SiLU(), nn.Flatten()]
    end = [nn.Linear(12, 10), nn.GELU(), nn.Dropout(), nn.Linear(10, 5)]
    model = nn.Sequential(
        *conv_norm_act(3, 8, 3, 2, act=nn.Hardswish),
        *flow(8, 24, 8),
        *conv_norm_act(8, 16, act=nn.GELU),
        *head,
        *end,
    ).eval()
    stem, _, last, average, *linear = read(model, (1, 3, 32, 32)).layers
    assert (stem.stage.clip, last.stage.clip) == ("hardswish", "gelu")
    assert average.is_flat
    assert [layer.stage.conv for layer in linear] == [head[1], end[0], end[3]]
    assert [layer.stage.clip for layer in linear] == ["silu", "gelu", (float("-inf"), float("inf"))]


@pytest.mark.parametrize("flat", [False, True])
def test_flatness_is_that_of_the_result(flat):
    layers = [nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*layers, *[nn.Flatten()] * flat).eval()
    _, average, linear = read(model, (1, 8, 6, 6)).layers
    assert average.is_flat == flat
    assert isinstance(linear, LinearLayer)


def test_formulas_in_words():
    assert str(HARDSIGMOID) == "clamp(0.166667 * x + 0.5, 0, 1)"
    assert str(HARDSWISH) == "x * clamp(0.166667 * x + 0.5, 0, 1)"
    assert str(Formula(2.0, -1.0)) == "2 * x - 1"
    assert str(Formula(1.0, 1.0, times_t=True)) == "x * (x + 1)"
