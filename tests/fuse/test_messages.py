"""Messages speak of what the user gave: the shape of x, the channels of the block, their layers."""

import re

import numpy as np
import pytest
import torch
from forwards import Copied, conv_norm_act, layers
from forwards_of_libraries import FORWARDS, WrittenOut
from same_answers import image, randomise, why_other
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")

# Names of what `fuse` makes of a block; no user has given such a tensor.
INTERNAL = re.compile(r"[wb]_(expand|dw|project)|C_hidden|FoldedWeights")


class NoNorms(Copied):
    settings = {"norm": None}


def without_expansion():
    return TorchvisionBlock(8, 16, 2, 1)


def sequence():
    return nn.Sequential(TorchvisionBlock(8, 8, 1, 3), TorchvisionBlock(8, 16, 2, 6))


BLOCKS = {
    "torchvision": lambda: TorchvisionBlock(8, 8, 1, 3),
    "copied": Copied,
    "written out": WrittenOut,
    "no expansion": without_expansion,
    "no norms": NoNorms,
    "bare sequence": lambda: nn.Sequential(*layers()),
    "sequence of blocks": sequence,
    "mk.InvertedResidual": lambda: mk.InvertedResidual(8, 8),
}


@pytest.fixture(params=BLOCKS)
def fused(request):
    torch.manual_seed(0)
    return mk.fuse(randomise(BLOCKS[request.param]()))


def message(model, x) -> str:
    """What a call raises; also for the call after one that was right."""
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        model(x)
    return str(caught.value)


def test_too_many_channels(fused):
    """The shape of x, and how many channels the block has."""
    for turn in range(3):
        said = message(fused, torch.zeros(1, 9, 5, 6))
        assert not INTERNAL.search(said), said
        assert re.search(r"1, 9, 5, 6", said), said
        assert re.search(r"\b8\b", said) and re.search(r"\b9\b", said), said
        assert "channels" in said, said
        if turn:
            with torch.no_grad():
                fused(torch.zeros(1, 8, 5, 6))


def test_too_many_channels_for_a_network():
    """An image of four channels, for a network of three."""
    for model in (mk.fuse(mobilenet_v2(width_mult=0.35)), mk.mobilenet_v2(width_mult=0.35)):
        model.eval()
        for _ in range(3):
            said = message(model, torch.zeros(1, 4, 32, 32))
            assert not INTERNAL.search(said), said
            assert re.search(r"1, 4, 32, 32", said) and re.search(r"\b3\b", said), said
            with torch.no_grad():
                model(torch.zeros(1, 3, 32, 32))


def test_too_many_channels_where_gradients_are_recorded(fused):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        fused(torch.zeros(1, 9, 5, 6, requires_grad=True))
    assert "1, 9, 5, 6" in str(caught.value) and not INTERNAL.search(str(caught.value))


def test_another_dtype(fused):
    """The message names x's dtype, or the weights'; nothing the user never saw."""
    for dtype, word in ((torch.float64, "double|float64"), (torch.int64, "long|int64")):
        said = message(fused, torch.zeros(1, 8, 5, 6).to(dtype))
        assert not INTERNAL.search(said), said
        assert re.search(word, said, re.IGNORECASE), said


@pytest.mark.parametrize("shape", [(8, 5), (5,), (1, 1, 8, 5, 6)])
def test_another_number_of_dimensions(fused, shape):
    said = message(fused, torch.zeros(shape))
    assert not INTERNAL.search(said), said
    assert re.search(r"\bD\b|\dD|dim|shape|size", said), said


@pytest.mark.parametrize("x", [np.zeros((1, 8, 5, 6), np.float32), None, [1.0], "x"])
def test_no_tensor(fused, x):
    """As PyTorch's layers do: an error that says what came instead."""
    with pytest.raises((TypeError, AttributeError)) as caught:
        fused(x)
    assert not INTERNAL.search(str(caught.value))
    assert type(x).__name__ in str(caught.value)


def test_an_image_without_a_batch():
    """`nn.Conv2d` takes (C, H, W), so a block without norms does, fused or not."""
    torch.manual_seed(0)
    for stride, outputs in ((1, 8), (2, 16)):
        plain = nn.Sequential(*layers(stride=stride, outputs=outputs, norm=None)).eval()
        fused, x = mk.fuse(plain), image(8, 9, 7)
        for batch in (x, x[None], x, x.repeat(3, 1, 1, 1)):
            with torch.no_grad():
                truth = plain.double()(batch.double())
                expected, found = plain.float()(batch), fused(batch)
            assert found.dim() == batch.dim()
            assert (reason := why_other(found, expected, truth)) is None, reason


def test_gradients_of_an_image_without_a_batch():
    torch.manual_seed(0)
    plain = NoNorms().eval()
    fused = mk.fuse(plain)
    results = []
    for model in (plain, fused):
        x = image(8, 9, 7).requires_grad_()
        model(x).square().mean().backward()
        results.append(x.grad)
    assert results[1].shape == (8, 9, 7)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-6)


def test_an_image_without_a_batch_where_norms_refuse_it():
    """`nn.BatchNorm2d` takes four dimensions only, and says so; so does what is fused."""
    fused = mk.fuse(TorchvisionBlock(8, 8, 1, 3).eval())
    said = message(fused, torch.zeros(8, 5, 6))
    assert not INTERNAL.search(said), said
    assert re.search(r"4D|8, 5, 6|3D", said), said


class Separable(nn.Module):
    """A depthwise convolution in a block of no known kind: there is a pool in its middle."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        return self.pointwise(F.max_pool2d(torch.tanh(self.depthwise(x)), 2))


def lone_depthwise():
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Tanh())


def test_depthwise_convolutions_in_no_block_are_told():
    model = nn.Sequential(nn.ReLU(), lone_depthwise())
    for report in (mk.explain(model), mk.explain(mk.fuse(model))):
        assert "1 depthwise convolution is in no such block: 1.0." in str(report), str(report)


def test_depthwise_convolutions_beside_blocks_are_told():
    """Also where other blocks were found, and by name; those inside blocks are not counted."""
    blocks = [TorchvisionBlock(8, 8, 1, 3), TorchvisionBlock(8, 8, 1, 3)]
    for other, name in ((lone_depthwise(), "3.0"), (Separable(), "3")):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, other).eval()
        report = mk.explain(mk.fuse(model))
        # In a row of its own, with a reason, or among the others.
        told = [row.name for row in report if row.state == "declined"] + [*report.outside]
        assert told == [name] and name in str(report), str(report)
        without = str(mk.explain(mk.fuse(model[:3])))
        assert not re.search(r"depthwise convolution.* in no", without), without


def test_nothing_is_told_where_nothing_is_depthwise():
    model = nn.Sequential(*conv_norm_act(3, 8, 3), *conv_norm_act(8, 8, 3))
    assert "depthwise convolution" not in str(mk.explain(model))


@pytest.mark.parametrize("name", [n for n, case in FORWARDS.items() if not case.is_block])
def test_no_silence(name):
    """Each of these has a depthwise convolution; `explain` has a word for what became of it."""
    report = mk.explain(mk.fuse(randomise(FORWARDS[name].build())))
    assert report or "depthwise" in str(report), str(report)


# What a reason must speak of: something the user can find in their own forward.
REASONS = {
    "gated": r"sigmoid|mean|mul",
    "interpolated": r"interpolate",
    "by values": r"trace|control flow|branch|values|bool",
    "mobilefacenet, prelu": r"PReLU",
    "grouped expansion": r"group",
    "grouped projection": r"group",
    "one norm in training mode": r"statistics",
    "random scale": r"rand|mul|trace|item",
    "counts calls": r"calls|attribute|changes|trace|assign",
    "multiplied": r"mul|\*",
    "concatenated": r"cat",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_in_the_users_forward(name):
    """Where the module itself is declined, the sentence names what its forward does."""
    model = mk.fuse(randomise(FORWARDS[name].build()))
    own = [row for row in mk.explain(model) if row.name == ""]
    inside = [row for row in mk.explain(model) if row.state == "fused" and row.name]
    if not own:
        assert inside or "depthwise" in str(mk.explain(model))
    for row in own:
        assert row.state == "declined", str(row)
        assert re.search(REASONS[name], row.reason), row.reason


def test_fold_of_what_is_no_block():
    """`fold` says which class it was given and why not."""
    for name in ("grouped projection", "mobilefacenet, prelu", "gated"):
        block = FORWARDS[name].build()
        with pytest.raises(ValueError) as caught:
            mk.fold(block)
        assert type(block).__name__ in str(caught.value)
        assert not INTERNAL.search(str(caught.value))


def test_plan_of_what_is_no_chain():
    """`plan` names what the forward does that no plan has."""
    for name in ("gated", "interpolated", "concatenated"):
        with pytest.raises(ValueError, match="plan: .*cannot"):
            mk.plan(randomise(FORWARDS[name].build()), (8, 9, 7))
