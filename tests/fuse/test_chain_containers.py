"""What becomes a block among the children of an nn.Sequential, what does not, and what is said."""

import copy

import pytest
import torch
import torchvision
from chains import assert_same, fuse, image, mobilenet_v1, pair, spans
from foreign_blocks import (
    ConvBNReLU,
    Flat,
    conv_norm_act,
    flow,
    transformers_stem,
)
from same_answers import randomise
from timm.layers import Conv2dSame
from torch import nn
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleNetBlock
from torchvision.ops import SqueezeExcitation

import mnv2_kernels as mk
from mnv2_kernels.ops.backends import ran

pytestmark = pytest.mark.usefixtures("one_thread")


def units(*groups):
    return [ConvBNReLU(*group) for group in groups]


def depthwise(channels=8, **settings):
    return conv_norm_act(channels, channels, 3, 1, channels, **settings)


# Children of a Sequential, and which of them become a block.
CONTAINERS = {
    "convolutions with norm and activation": (
        lambda: units(conv_norm_act(8, 8, 3), depthwise(), conv_norm_act(8, 16), depthwise(16)),
        ["[1:3]"],
    ),
    "an expansion before the depthwise": (
        lambda: [nn.MaxPool2d(2), *flow(8, 24, 16), nn.Tanh()],
        ["[1:9]"],
    ),
    "an expansion in a child of its own": (
        lambda: [*units(conv_norm_act(8, 24)), nn.Sequential(*pair(24, 8))],
        [""],
    ),
    "a 1x1 that ends one block begins no other": (
        lambda: [*units(depthwise(), conv_norm_act(8, 8)) * 2],
        ["[0:2]", "[2:4]"],
    ),
    "norm and activation behind a child with both convolutions": (
        lambda: [
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 12, 1)),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 3, 3),
        ],
        ["[0:3]"],
    ),
    "SSDLite's prediction, a 1x1 without norm": (
        lambda: [*units(depthwise()), nn.Conv2d(8, 24, 1)],
        [""],
    ),
    "only the pair where the expansion does something else": (
        lambda: [nn.Conv2d(8, 24, 1), nn.Mish(), *pair(24, 8)],
        ["[2:8]"],
    ),
    "a zero padding": (
        lambda: [nn.Tanh(), nn.ZeroPad2d((0, 1, 0, 1)), *flow(8, 8, 8, padding=0)],
        ["[1:7]"],
    ),
    "TensorFlow's padding by the size": (
        lambda: [
            Conv2dSame(8, 8, 3, stride=2, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            *conv_norm_act(8, 16),
        ],
        [""],
    ),
    "three levels deep": (
        lambda: [nn.Sequential(nn.Tanh(), nn.Sequential(*pair(), nn.Tanh()))],
        ["0.1[0:6]"],
    ),
    "the same child twice": (lambda: [*pair()] * 2, ["[0:6]", "[6:12]"]),
    "a lone depthwise": (lambda: depthwise(), []),
    "a 1x1 of other channels": (
        lambda: [*depthwise(), nn.PixelShuffle(2), nn.Conv2d(2, 8, 1)],
        [],
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_is_fused_in_a_container(name):
    build, expected = CONTAINERS[name]
    model = randomise(nn.Sequential(*build())).double()
    assert spans(model) == expected
    fused = fuse(model)
    assert spans(fused) == expected
    for size in ((12, 14), (9, 11), (8, 13)):
        assert_same(fused, model, image(8, size))


# Children of a Sequential, and why they stay as they are.
DECLINED = {
    "mish": (
        lambda: pair(act=nn.Mish),
        "mish is not supported, in 2",
    ),
    "squeeze-excite before the activation": (
        lambda: [*depthwise()[:2], SqueezeExcitation(8, 4), nn.ReLU6(), nn.Conv2d(8, 8, 1)],
        "a gate must come between the depthwise and the projection, got it before the activation",
    ),
    "squeeze-excite by tanh": (
        lambda: [
            *units(depthwise()),
            SqueezeExcitation(8, 4, scale_activation=nn.Tanh),
            nn.Conv2d(8, 8, 1),
        ],
        "tanh is not supported, in 1.scale_activation",
    ),
    "group norm": (
        lambda: [*depthwise()[:1], nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1)],
        "group_norm is not supported, in 1",
    ),
    "kernel 9": (lambda: pair(kernel=9), "kernel_size"),
    "dilation 73": (lambda: [*flow(8, 8, 8, padding=73, dilation=73)], "dilation"),
    "parts of children": (
        lambda: [nn.Sequential(nn.Tanh(), *depthwise()), *conv_norm_act(8, 8)],
        "tanh is not supported, in 0.0",
    ),
    "a depthwise last": (
        lambda: [*conv_norm_act(8, 8), *depthwise()],
        "expected one inverted residual, found a 1x1 convolution, a 3x3 depthwise",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_in_a_container(name):
    build, reason = DECLINED[name]
    model = nn.Sequential(*build()).eval()
    (row,) = mk.explain(model)
    assert (row.name, row.state) == ("", "declined")
    assert reason in row.reason
    assert mk.fuse(model, inplace=True) is model
    assert type(model) is nn.Sequential


def test_layers_with_a_hook_are_in_no_block():
    model = mobilenet_v1()
    calls = []
    model[4].register_forward_hook(lambda *args: calls.append(args))
    assert mk.explain(model).outside == ("3",)
    # The 1x1 convolution after these layers is an expansion now.
    assert spans(model) == ["[6:15]", "[15:21]"]
    fused = fuse(model)
    assert spans(fused) == ["[6:15]", "[15:21]"]
    x = image()
    assert_same(fused, model, x)
    assert len(calls) == 2


def test_children_of_a_declined_block_stay():
    block = Flat([*flow()[:-4], nn.Mish(), *conv_norm_act(24, 8)], True)
    (row,) = mk.explain(nn.Sequential(block))
    assert (row.name, row.state) == ("0", "declined")


def test_torchvision_mnasnet_begins_with_a_block_of_flat_children():
    model = randomise(torchvision.models.mnasnet0_5(num_classes=5)).double()
    fused = fuse(model)
    assert spans(fused)[0] == "layers[3:8]"
    assert len(fused.layers) == len(model.layers) == 17
    assert_same(fused, model, image(3, (32, 33)))
    assert_same(fused.layers[:9], model.layers[:9], image(3, (32, 33)))


def test_shufflenet_branches():
    block = randomise(ShuffleNetBlock(16, 16, 1)).double()
    fused = fuse(block)
    assert spans(fused) == ["branch2"]
    assert_same(fused, block, image(16))


@pytest.mark.parametrize("tf_padding", [False, True])
@pytest.mark.parametrize("first_layer_is_expansion", [False, True])
def test_stem_of_transformers(tf_padding, first_layer_is_expansion):
    settings = {"tf_padding": tf_padding, "first_layer_is_expansion": first_layer_is_expansion}
    stem = randomise(transformers_stem(**settings)).double()
    fused = fuse(stem)
    assert spans(fused) == ["[1:3]" if first_layer_is_expansion else "[1:4]"]
    assert not isinstance(fused, nn.Sequential)
    for size in ((12, 14), (9, 11)):
        assert_same(fused, stem, image(8, size))
    assert type(mk.unfuse(fused)) is type(stem)


class Steps(nn.Module):
    """Runs its children in order, but the last one only where it is asked to."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(*depthwise())
        self.second = nn.Sequential(*conv_norm_act(8, 8))
        self.third = nn.Sequential(*conv_norm_act(8, 8))
        self.goes_on = True

    def forward(self, x):
        x = self.second(self.first(x))
        return self.third(x) if self.goes_on else x


class StepsBySize(Steps):
    def forward(self, x):
        y = self.second(self.first(x))
        return self.third(y) if x.shape[2] > 20 else y


def test_a_module_that_runs_its_children_in_order():
    """For as long as it does."""
    model = randomise(Steps()).double()
    fused = fuse(model)
    assert spans(fused) == ["[0:2]"]
    before = ran().get("reference", 0)
    assert_same(fused, model, image(8))
    assert ran()["reference"] == before + 1
    for goes_on in (False, True):
        fused.goes_on = model.goes_on = goes_on
        assert_same(fused, model, image(8))
        assert fused.goes_on is goes_on
    fused.third = model.third = nn.Tanh()
    assert_same(fused, model, image(8))


def test_a_module_whose_children_depend_on_the_size():
    model = randomise(StepsBySize()).double()
    fused = fuse(model)
    assert spans(fused) == ["[0:2]"]
    for size in ((24, 24), (9, 11), (24, 10), (12, 30)):
        assert_same(fused, model, image(8, size))
    compiled = torch.compile(fused, backend="eager", fullgraph=True, dynamic=False)
    assert_same(compiled, model, image(8, (9, 11)))
    assert_same(copy.deepcopy(fused), model, image(8, (9, 11)))


def test_explain_has_the_sizes_of_runs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *pair(8, 16, 2)).eval()
    for container in (model, fuse(model)):
        (row,) = mk.explain(container, input_shape=(1, 3, 40, 24))
        assert row.input_hw == (20, 12)
        # There is no expansion; the depthwise's result is half as high and wide.
        assert row.bytes_saved == 4 * 8 * 10 * 6
