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


def stride_changed() -> nn.Module:
    model = ours()
    model.features[2].conv[1][0].stride = (1, 1)
    return model


def stem(*settings, **more) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, *settings, **more), mk.InvertedResidual(16, 8))


def behind(*layers: nn.Module) -> nn.Module:
    """A stem and a block with layers behind."""
    begin = nn.Sequential(*conv_norm_act(3, 16, 3, 2)), mk.InvertedResidual(16, 8)
    return nn.Sequential(*begin, *layers)


STEM = (
    "0 must be a 3x3 convolution with stride 2, dilation 1, 1 group and at most 2 zeros around its"
    " input, got kernel_size=(3, 3), "
)
HEAD = "2 must be a 1x1 convolution with stride 1, 1 group and no padding, got "
DECLINED = {
    "squeeze-excite of timm": (
        lambda: timm.create_model("semnasnet_100"),
        "EfficientNet cannot be run as a plan: blocks.2.0: se is SqueezeExcite, expected Identity",
    ),
    "squeeze-excite of torchvision": (
        torchvision.models.mobilenet_v3_large,
        "MobileNetV3 cannot be run as a plan: features.4: SqueezeExcitation is not a convolution",
    ),
    "padding at run time behind the blocks": (
        lambda: behind(Conv2dSame(8, 20, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        HEAD + "kernel_size=(1, 1), stride=(2, 2), groups=1, padding=None",
    ),
    "padding at run time of another stem": (
        lambda: nn.Sequential(Conv2dSame(3, 16, 5, 2), mk.InvertedResidual(16, 8)),
        "0 must be ",
    ),
    "depthwise without projection": (
        lambda: behind(*conv_norm_act(8, 8, 3, 1, groups=8)),
        "2 must be a 3x3 convolution with stride 2, dilation 1, 1 group",
    ),
    "depthwise of another size": (
        lambda: behind(*conv_norm_act(8, 8, 7, 1, groups=8), *conv_norm_act(8, 9)),
        "2: the depthwise must have a kernel_size in (3, 5), got (7, 7)",
    ),
    "replaced forward of the stem": (
        lambda: replaced_forward("features.0.0"),
        "features.0.0: the forward of this very module has been replaced",
    ),
    "replaced forward of the stem's clip": (
        lambda: replaced_forward("features.0.2"),
        "features.0.0: the forward of this very module has been replaced",
    ),
    "two branches": (lambda: Changed(two_branches), "it is no chain"),
    "around the network": (lambda: Changed(around_the_network), "it is no chain"),
    "a tensor twice": (lambda: Changed(a_tensor_twice), "mul is an operation that a plan has no"),
    "two results": (lambda: Changed(two_results), "its result is not a tensor"),
    "a list": (lambda: Changed(a_list), "its result is not a tensor"),
    "by values": (lambda: Changed(by_values), "its forward cannot be traced: "),
    "an operation": (
        lambda: Changed(an_operation),
        "sigmoid is an operation that a plan has no step for",
    ),
    "pooled by half": (
        lambda: Changed(pooled_by_half),
        "adaptive_avg_pool2d is an operation that a plan has no step for",
    ),
    "dropped in evaluation": (
        lambda: Changed(dropped_in_evaluation),
        "dropout is an operation that a plan has no step for",
    ),
    "mean of rows": (
        lambda: Changed(mean_of_rows),
        "mean is an operation that a plan has no step for",
    ),
    "hook in a block": (
        lambda: hooked("features.3.conv.1.0"),
        "features.3.conv.1.0 has hooks, which would not be called",
    ),
    "hook of the model": (
        lambda: hooked(""),
        "the model itself has hooks, which would not be called",
    ),
    "hook of the stem": (
        lambda: hooked("features.0.0"),
        "features.0.0 has hooks, which would not be called",
    ),
    "hook around the stem": (
        lambda: hooked("features.0"),
        "features.0 has hooks, which would not be called",
    ),
    "hook of a block": (
        lambda: hooked("features.5"),
        "features.5 has hooks, which would not be called",
    ),
    "hook of the classifier": (
        lambda: hooked("classifier.1"),
        "classifier.1 has hooks, which would not be called",
    ),
    "parametrized": (parametrized, "this very module is parametrized"),
    "replaced forward": (replaced_forward, "the forward of this very module has been replaced"),
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
    "stem of another size": (lambda: stem(5, 2), "0 must be "),
    "stem that pads with copies": (
        lambda: stem(3, 2, 1, padding_mode="reflect"),
        "0: padding_mode must be",
    ),
    "1x1 with stride": (
        lambda: behind(nn.Conv2d(8, 20, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        HEAD + "kernel_size=(1, 1), stride=(2, 2), groups=1, padding=(0, 0, 0, 0)",
    ),
    "1x1 with groups": (
        lambda: behind(nn.Conv2d(8, 20, 1, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        HEAD + "kernel_size=(1, 1), stride=(1, 1), groups=4, padding=(0, 0, 0, 0)",
    ),
    "1x1 with padding": (
        lambda: behind(nn.Conv2d(8, 20, 1, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        HEAD + "kernel_size=(1, 1), stride=(1, 1), groups=1, padding=(1, 1, 1, 1)",
    ),
    "pool that is not flattened": (
        lambda: behind(nn.AdaptiveAvgPool2d(1)),
        "_2 must be flattened",
    ),
    "pool before blocks": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "_0 must follow a block",
    ),
    "flattened image": (
        lambda: behind(nn.Flatten()),
        "_2 must follow an average over all pixels",
    ),
    "max pool": (
        lambda: behind(nn.MaxPool2d(2)),
        "2 is MaxPool2d, which a plan has no step for",
    ),
    "activation in between": (lambda: behind(nn.Sigmoid()), "2 is Sigmoid, which"),
    "norm in between": (lambda: behind(nn.BatchNorm2d(8)), "2: BatchNorm2d stands where a"),
    "activation of a block": (
        lambda: edited(torchvision.models.mobilenet_v2(), "features.3.conv.0.2", nn.SiLU()),
        "features.3: SiLU is not a convolution, a batch norm, ReLU, ReLU6 or Hardtanh",
    ),
    "activation of a block after fusing": (
        lambda: edited(ours(), "features.3.conv.0.2", nn.SiLU()),
        "features.3: inner modules have been replaced: unfuse, then fuse again",
    ),
    "stride of a block after fusing": (
        stride_changed,
        "features.2: a convolution or a clip has been changed: unfuse, then fuse again",
    ),
    "no layers": (nn.Sequential, "Sequential cannot be run as a plan: it has no layers"),
    "linear without average": (
        lambda: behind(nn.Linear(32, 5)),
        "2 must follow an average over all pixels",
    ),
    "block behind the average": (
        lambda: behind(nn.AdaptiveAvgPool2d(1), nn.Flatten(), mk.InvertedResidual(8, 8)),
        "4 must not follow an average over all pixels",
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
        with pytest.raises(ValueError, match="^plan: input_shape must have 3 channels, got "):
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
