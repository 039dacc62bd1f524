"""What becomes a block among the children of an nn.Sequential, what does not, and what is said."""

import pytest
import torch
import torchvision
from chains import assert_same, fuse, image, mobilenet_v1, pair, spans
from foreign_blocks import ConvBNReLU, Flat, conv_norm_act, flow, randomise, transformers_stem
from timm.layers import Conv2dSame
from torch import nn
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleNetBlock
from torchvision.ops import SqueezeExcitation

import mnv2_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")


def units(*groups):
    return [ConvBNReLU(*group) for group in groups]


def depthwise(channels=8, **settings):
    return conv_norm_act(channels, channels, 3, 1, channels, **settings)


# What stands in a Sequential, and which of its children become a block.
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
        ["1"],
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
        lambda: [nn.Conv2d(8, 24, 1), nn.SiLU(), *pair(24, 8)],
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
        ["[0:6]"],
    ),
    "three levels deep": (
        lambda: [nn.Sequential(nn.Tanh(), nn.Sequential(*pair(), nn.Tanh()))],
        ["0.1[0:6]"],
    ),
    "the same child twice": (lambda: [*pair()] * 2, ["[0:6]", "[6:12]"]),
    "a lone depthwise": (lambda: depthwise(), []),
    "a depthwise last": (lambda: [*conv_norm_act(8, 8), *depthwise()], []),
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


# What stands in a Sequential, where the row is, and why it stays as it is.
DECLINED = {
    "hard swish": (lambda: pair(act=nn.Hardswish), "[0:5]", "Hardswish is not"),
    "squeeze-excite": (
        lambda: [*units(depthwise()), SqueezeExcitation(8, 4), nn.Conv2d(8, 8, 1)],
        "[0:3]",
        "SqueezeExcitation is not",
    ),
    "group norm": (
        lambda: [*depthwise()[:1], nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1)],
        "[0:4]",
        "GroupNorm is not",
    ),
    "kernel 7": (lambda: pair(kernel=7), "[0:6]", "kernel_size"),
    "dilation 12": (
        lambda: [nn.Tanh(), *flow(8, 8, 8, padding=12, dilation=12)],
        "[1:6]",
        "dilation",
    ),
    "parts of children": (
        lambda: [nn.Sequential(nn.Tanh(), *depthwise()), *conv_norm_act(8, 8)],
        "[0:4]",
        "Tanh stands where",
    ),
    "quantised": (
        lambda: [*depthwise(), torch.ao.nn.quantized.Conv2d(8, 8, 1)],
        "[0:4]",
        "quantised Conv2d",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_in_a_container(name):
    build, where, reason = DECLINED[name]
    model = nn.Sequential(*build()).eval()
    (row,) = mk.explain(model)
    assert (row.name, row.state) == (where, "declined")
    assert reason in row.reason
    assert mk.fuse(model, inplace=True) is model


def test_hook_before_fusing_is_the_reason():
    model = mobilenet_v1()
    model[4].register_forward_hook(lambda *args: None)
    rows = {row.name: row for row in mk.explain(model)}
    assert rows["[3:9]"].reason == "4 has hooks, which would not be called"
    assert spans(fuse(model)) == ["[9:15]", "[15:21]"]


def test_children_of_a_declined_block_stay():
    block = Flat([*flow()[:-2], *conv_norm_act(24, 8, act=nn.SiLU)], True)
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


def test_explain_has_the_sizes_of_runs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *pair(8, 16, 2)).eval()
    for container in (model, fuse(model)):
        (row,) = mk.explain(container, input_shape=(1, 3, 40, 24))
        assert row.input_hw == (20, 12)
        # There is no expansion; the depthwise's result is half as high and wide.
        assert row.bytes_saved == 4 * 8 * 10 * 6
