"""Models that are no plan: the sentence says which layer does not fit, and how."""

import cases
import pytest
import timm
import torch
import torchvision
from foreign_blocks import conv_norm_act, edited
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import mnv2_kernels as mk

pytestmark = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)


def ours() -> nn.Module:
    return mk.mobilenet_v2(0.35, 10)


class Changed(nn.Module):
    """A network whose forward is another one."""

    def __init__(self, forward, children=None):
        super().__init__()
        self.features = children or ours().features
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def two_branches(self, x):
    x = self.features[0](x)
    return self.features[1](x) + self.features[1](x.flip(3))


def around_the_network(self, x):
    return x + self.features[0](x).mean()


def a_tensor_twice(self, x):
    x = self.features(x)
    return x * x


def an_operation(self, x):
    return torch.sigmoid(self.features(x))


def by_values(self, x):
    return self.features(x) if x.sum() > 0 else x


def two_results(self, x):
    x = self.features(x)
    return x, x


def a_list(self, x):
    return [self.features(x)]


def pooled_by_half(self, x):
    return F.adaptive_avg_pool2d(self.features(x), 2)


def dropped_in_evaluation(self, x):
    return F.dropout(self.features(x), 0.5, True)


def mean_of_rows(self, x):
    return self.features(x).mean(2)


def hooked(path: str) -> nn.Module:
    model = ours()
    model.get_submodule(path).register_forward_hook(lambda *args: None)
    return model


def parametrized() -> nn.Module:
    model = ours()
    parametrizations.weight_norm(model.classifier[1])
    return model


def replaced_forward(path: str = "classifier.1") -> nn.Module:
    model = ours()
    model.get_submodule(path).forward = lambda x: x
    return model


def stem(*settings, **more) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, *settings, **more), mk.InvertedResidual(16, 8))


def behind(*layers: nn.Module) -> nn.Module:
    """A stem and a block with layers behind."""
    begin = nn.Sequential(*conv_norm_act(3, 16, 3, 2)), mk.InvertedResidual(16, 8)
    return nn.Sequential(*begin, *layers)


CONVOLUTION = (
    "a convolution outside of blocks must be 1x1 with stride 1, 1 group and no padding, or the"
    " first layer and 3x3 with stride 2, 1 group and at most 2 zeros around its input, got "
)
STEM, HEAD = CONVOLUTION + "kernel_size=(3, 3), ", CONVOLUTION + "kernel_size=(1, 1), "
DECLINED = {
    "split channels of timm": (
        lambda: timm.create_model("mixnet_s"),
        "EfficientNet cannot be run as a plan: split is not supported, in",
    ),
    "padding at run time behind the blocks": (
        lambda: behind(Conv2dSame(8, 20, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        HEAD + "stride=(2, 2), dilation=(1, 1), groups=1, padding=(0, 0, 0, 0)",
    ),
    "padding at run time of another stem": (
        lambda: nn.Sequential(Conv2dSame(3, 16, 5, 2), mk.InvertedResidual(16, 8)),
        CONVOLUTION + "kernel_size=(5, 5), ",
    ),
    "depthwise without projection": (
        lambda: behind(*conv_norm_act(8, 8, 3, 1, groups=8)),
        STEM + "stride=(1, 1), dilation=(1, 1), groups=8",
    ),
    "depthwise of another size": (
        lambda: behind(*conv_norm_act(8, 8, 9, 1, groups=8), *conv_norm_act(8, 9)),
        "the depthwise must have a kernel_size in (3, 5, 7), got (9, 9)",
    ),
    "replaced forward of the stem": (
        lambda: replaced_forward("features.0.0"),
        "the forward of features.0.0 (Conv2d) has been replaced",
    ),
    "replaced forward of the stem's clip": (
        lambda: replaced_forward("features.0.2"),
        "the forward of features.0.2 (ReLU6) has been replaced",
    ),
    "two branches": (lambda: Changed(two_branches), "flip is not supported"),
    "around the network": (
        lambda: Changed(around_the_network),
        "its mean is not over all pixels",
    ),
    "a tensor twice": (
        lambda: Changed(a_tensor_twice),
        "it computes x * x, which is no activation",
    ),
    "two results": (lambda: Changed(two_results), "its result is a tuple that was not"),
    "a list": (lambda: Changed(a_list), "its result is a list that was not"),
    "by values": (lambda: Changed(by_values), "sum is not supported"),
    "an operation": (
        lambda: Changed(an_operation),
        "a sigmoid must be a part of a gate or of SiLU, got it alone",
    ),
    "pooled by half": (
        lambda: Changed(pooled_by_half),
        "its average pool has a result of (2, 2), expected one pixel",
    ),
    "dropped in evaluation": (
        lambda: Changed(dropped_in_evaluation),
        "dropout is in training mode and drops values",
    ),
    "mean of rows": (
        lambda: Changed(mean_of_rows),
        "its mean is not over all pixels",
    ),
    "hook in a block": (
        lambda: hooked("features.3.conv.1.0"),
        "features.3.conv.1.0 (PaddedConv2d) has hooks, which would not be called",
    ),
    "hook of the model": (
        lambda: hooked(""),
        "MobileNetV2 has hooks, which would not be called",
    ),
    "hook of the stem": (
        lambda: hooked("features.0.0"),
        "features.0.0 (Conv2d) has hooks, which would not be called",
    ),
    "hook around the stem": (
        lambda: hooked("features.0"),
        "features.0 (Sequential) has hooks, which would not be called",
    ),
    "hook of a block": (
        lambda: hooked("features.5"),
        "features.5 (InvertedResidual) has hooks, which would not be called",
    ),
    "hook of the classifier": (
        lambda: hooked("classifier.1"),
        "classifier.1 (Linear) has hooks, which would not be called",
    ),
    "parametrized": (parametrized, "classifier.1 (ParametrizedLinear) is parametrized"),
    "replaced forward": (
        replaced_forward,
        "the forward of classifier.1 (Linear) has been replaced",
    ),
    "stem with stride 1": (lambda: stem(3, padding=1), STEM + "stride=(1, 1), dilation=(1, 1), "),
    "stem with groups": (
        lambda: nn.Sequential(nn.Conv2d(4, 16, 3, 2, 1, groups=2), mk.InvertedResidual(16, 8)),
        STEM + "stride=(2, 2), dilation=(1, 1), groups=2, ",
    ),
    "stem with dilation": (
        lambda: stem(3, 2, dilation=2),
        STEM + "stride=(2, 2), dilation=(2, 2), groups=1, padding=(0, 0, 0, 0)",
    ),
    "stem with wide padding": (
        lambda: stem(3, 2, padding=3),
        STEM + "stride=(2, 2), dilation=(1, 1), groups=1, padding=(3, 3, 3, 3)",
    ),
    "stem of another size": (lambda: stem(5, 2), CONVOLUTION + "kernel_size=(5, 5), "),
    "stem that pads with copies": (
        lambda: stem(3, 2, 1, padding_mode="reflect"),
        "its padding is reflect and not of zeros, in 0 (Conv2d)",
    ),
    "1x1 with stride": (
        lambda: behind(nn.Conv2d(8, 20, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        HEAD + "stride=(2, 2), dilation=(1, 1), groups=1, padding=(0, 0, 0, 0)",
    ),
    "1x1 with groups": (
        lambda: behind(nn.Conv2d(8, 20, 1, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        HEAD + "stride=(1, 1), dilation=(1, 1), groups=4, padding=(0, 0, 0, 0)",
    ),
    "1x1 with padding": (
        lambda: behind(nn.Conv2d(8, 20, 1, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        HEAD + "stride=(1, 1), dilation=(1, 1), groups=1, padding=(1, 1, 1, 1)",
    ),
    "pool that is not flattened": (
        lambda: behind(nn.AdaptiveAvgPool2d(1)),
        "an average over all pixels must be flattened",
    ),
    "pool before blocks": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "it has no parameters",
    ),
    "flattened image": (
        lambda: behind(nn.Flatten()),
        "it reshapes (1, 8, 32, 32) to (1, -1), in 2 (Flatten)",
    ),
    "max pool": (
        lambda: behind(nn.MaxPool2d(2)),
        "max_pool2d is not supported, in 2 (MaxPool2d)",
    ),
    "activation in between": (lambda: behind(nn.Tanh()), "tanh is not supported"),
    "norm in between": (lambda: behind(nn.BatchNorm2d(8)), "a batch norm follows another one"),
    "activation of a block": (
        lambda: edited(torchvision.models.mobilenet_v2(), "features.3.conv.0.2", nn.Mish()),
        "mish is not supported, in features.3.conv.0.2 (Mish)",
    ),
    "activation of a block after fusing": (
        lambda: edited(ours(), "features.3.conv.0.2", nn.Mish()),
        "mish is not supported, in features.3.conv.0.2 (Mish)",
    ),
    "no layers": (nn.Sequential, "Sequential cannot be run as a plan: it has no parameters"),
    "linear without average": (
        lambda: behind(nn.Linear(32, 5)),
        "a fully connected layer is not one of vectors with its own weight, in 2 (Linear)",
    ),
    "block behind the average": (
        lambda: behind(nn.AdaptiveAvgPool2d(1), nn.Flatten(), mk.InvertedResidual(8, 8)),
        "a convolution is not given an image (N, C, H, W), in 4.conv.0.0 (Conv2d)",
    ),
}


@pytest.mark.parametrize("why", DECLINED)
def test_declined(why):
    build, sentence = DECLINED[why]
    with pytest.raises(ValueError) as raised:
        mk.plan(build().eval(), (4 if "groups" in why and "stem" in why else 3, 64, 64))
    found = str(raised.value)
    assert found.startswith("plan: ") and " cannot be run as a plan: " in found
    assert sentence in found, found


@torch.no_grad()
def test_a_stride_changed_after_fusing():
    model = ours().eval()
    model.features[2].conv[1][0].stride = (1, 1)
    x = torch.randn(2, 3, 64, 64)
    y = mk.unfuse(model)
    for block in y.features[1:18]:
        block.forward = block.plain_forward
    torch.testing.assert_close(mk.plan(model, (3, 64, 64))(x), y(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [None, torch.ones(3), nn.Linear])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match="^plan: "):
        mk.plan(model, (3, 64, 64))


@pytest.mark.parametrize(
    "shape", [(), (3,), (3, 64), (1, 1, 3, 64, 64), (3, 0, 64), (3, 64, -1), (3, 64.0, 64)], ids=str
)
def test_what_is_no_shape(shape):
    with pytest.raises(ValueError, match=r"^plan: input_shape must be \(C, H, W\) or \(N, C, H, W"):
        mk.plan(ours(), shape)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_another_number_of_channels(channels):
    for model in (ours(), mk.InvertedResidual(3, 8)):
        with pytest.raises(ValueError, match="^plan: .*convolution of 3 channels is given "):
            mk.plan(model, (channels, 64, 64))


def test_an_image_too_small():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), mk.InvertedResidual(8, 8))
    with pytest.raises(ValueError, match=r"^plan: input_shape \(3, 2, 9\) is too small for 0$"):
        mk.plan(model, (3, 2, 9))
    assert mk.plan(model, (3, 3, 9))(torch.ones(1, 3, 3, 9)).shape == (1, 8, 1, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_dtypes_that_do_not_run_here(dtype):
    with pytest.raises(
        TypeError, match=f"^plan: dtype must be one of the CPU kernels, got {dtype}: x must be"
    ):
        mk.plan(ours(), (3, 64, 64), dtype=dtype)


def test_a_model_in_another_dtype():
    with pytest.raises(TypeError, match="^plan: dtype must be one of the CPU kernels, got torch"):
        mk.plan(ours().double(), (3, 64, 64))
    model = ours().bfloat16()
    plan = mk.plan(model, (3, 64, 64), dtype=torch.float32)
    assert plan(torch.ones(1, 3, 64, 64)).dtype == torch.float32
