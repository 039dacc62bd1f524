"""Whole networks with curves and gates: each inverted residual is read, and what is around them."""

from functools import partial

import pytest
import segmentation_models_pytorch
import timm
import torch
import torchvision
from foreign_blocks import largest_difference
from same_answers import randomise
from squeeze_excite import computed, reference_of
from torch import nn
from transformers import EfficientNetConfig, EfficientNetModel

from mnv2_kernels.block.config import NO_CLIP, RELU
from mnv2_kernels.block.fold import BlockLayers
from mnv2_kernels.recognizers import (
    AverageLayer,
    ConvLayer,
    LinearLayer,
    block_of,
    guess_channels,
    read,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def timm_model(name):
    return timm.create_model(name, pretrained=False)


# How many blocks there are, what is after their depthwises, and how many have a gate of which
# scale.
NETWORKS = {
    "torchvision mobilenet_v3_small": (
        torchvision.models.mobilenet_v3_small,
        (11, {RELU, "hardswish"}, 9, "hardsigmoid"),
    ),
    "torchvision mobilenet_v3_large": (
        torchvision.models.mobilenet_v3_large,
        (15, {RELU, "hardswish"}, 8, "hardsigmoid"),
    ),
    "torchvision efficientnet_b0": (
        torchvision.models.efficientnet_b0,
        (16, {"silu"}, 16, "sigmoid"),
    ),
    "timm mobilenetv3_small_100": (
        partial(timm_model, "mobilenetv3_small_100"),
        (11, {RELU, "hardswish"}, 9, "hardsigmoid"),
    ),
    "timm efficientnet_b0": (
        partial(timm_model, "efficientnet_b0"),
        (16, {"silu"}, 16, "sigmoid"),
    ),
    "timm lcnet_050": (partial(timm_model, "lcnet_050"), (13, {"hardswish"}, 2, "hardsigmoid")),
    "timm tinynet_e": (partial(timm_model, "tinynet_e"), (10, {"silu"}, 10, "sigmoid")),
    "timm semnasnet_075": (partial(timm_model, "semnasnet_075"), (16, {RELU}, 8, "sigmoid")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    build, (count, after, gates, scale) = NETWORKS[name]
    model = randomise(build()).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    layers = read(model, x.shape, [model]).layers
    blocks = [layer for layer in layers if isinstance(layer, BlockLayers)]
    assert len(blocks) == count
    assert {block.depthwise.clip for block in blocks} == after
    assert [b.gate.scale for b in blocks if b.gate is not None] == [scale] * gates
    kinds = [type(layer) for layer in layers if not isinstance(layer, BlockLayers)]
    assert kinds[0] is ConvLayer and kinds[-1] is LinearLayer and AverageLayer in kinds
    y = x
    with torch.no_grad():
        for layer in layers:
            y = computed(layer, y)
        assert largest_difference(y, model(x)) < 1e-10


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "lcnet_050"])
def test_head_that_is_a_convolution(name):
    model = timm_model(name).eval()
    *_, average, head, classifier = read(model, (1, 3, 224, 224), [model]).layers
    assert average.is_flat
    assert (head.stage.conv, head.stage.clip) == (model.conv_head, "hardswish")
    assert (classifier.stage.conv, classifier.stage.clip) == (model.classifier, NO_CLIP)


def assert_blocks(blocks: nn.ModuleList, count: int) -> None:
    assert len(blocks) == count
    for block in blocks:
        x = torch.randn(2, guess_channels([block]), 14, 14, dtype=torch.float64)
        layers = block_of(read(block, x.shape))
        assert layers.depthwise.clip == "silu"
        assert (layers.gate.squeeze.clip, layers.gate.scale) == ("silu", "sigmoid")
        with torch.no_grad():
            assert largest_difference(reference_of(layers, x), block(x)) < 1e-10


def test_transformers_efficientnet():
    config = EfficientNetConfig(width_coefficient=0.5, depth_coefficient=0.5)
    model = randomise(EfficientNetModel(config)).double()
    assert_blocks(model.encoder.blocks, 10)


def test_smp_efficientnet():
    encoder = segmentation_models_pytorch.encoders.get_encoder("efficientnet-b0", weights=None)
    assert_blocks(randomise(encoder).double()._blocks, 16)
