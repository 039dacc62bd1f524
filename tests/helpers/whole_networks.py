"""Networks whose layers run together as one call: made, counted and compared."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import mnv2_kernels as mk
from benchmarks.harness import randomise_norms
from mnv2_kernels.ops.backends import ran

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=10),
    "mnasnet": lambda: torchvision.models.mnasnet0_5(num_classes=10),
    "timm": lambda: timm.create_model("mobilenetv2_050", num_classes=10),
    "timm-same": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10),
    "timm-v1": lambda: timm.create_model("mobilenetv1_100", num_classes=10),
    "timm-headless": lambda: timm.create_model("mobilenetv2_050", num_classes=0),
    "ours": lambda: mk.mobilenet_v2(0.35, num_classes=10),
}


class Ran(NamedTuple):
    """What has run: several layers as one call, fused blocks alone, convolutions, and among them
    depthwise ones, and classifiers by PyTorch.
    """

    together: int = 0
    blocks: int = 0
    convolutions: int = 0
    depthwise: int = 0
    classifiers: int = 0


WHOLE = Ran(together=1)


class Watch:
    """Calls models and says what has run: `ran` of the last call."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.ran = Ran()
        self._by_pytorch = [0, 0, 0]
        conv2d, linear = F.conv2d, F.linear

        # Only the reading of a forward calls these with anything else than a tensor.
        def counted_conv2d(x, weight, *args, **kwargs):
            if type(x) is Tensor:
                self._by_pytorch[0] += 1
                # A gate of one squeezed channel has 1x1 kernels.
                self._by_pytorch[1] += weight.shape[1] == 1 < min(weight.shape[0], weight.shape[2])
            return conv2d(x, weight, *args, **kwargs)

        def counted_linear(x, *args, **kwargs):
            self._by_pytorch[2] += type(x) is Tensor
            return linear(x, *args, **kwargs)

        patch.setattr(F, "conv2d", counted_conv2d)
        patch.setattr(F, "linear", counted_linear)

    def __call__(self, model: Callable, *args, **kwargs) -> Tensor:
        before = self._now()
        y = model(*args, **kwargs)
        self.ran = Ran(*(now - then for now, then in zip(self._now(), before, strict=True)))
        return y

    def _now(self) -> Ran:
        calls = ran()
        together = calls.pop("network", 0)
        return Ran(together, sum(calls.values()), *self._by_pytorch)


def ready(model: nn.Module, *shape: int) -> nn.Module:
    """The model in evaluation mode, with statistics of images of a shape (C, H, W)."""
    torch.manual_seed(0)
    return randomise_norms(model, torch.randn(4, *shape or (3, 64, 64)))


def expect(original: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(original).double()(x.double())


def assert_same(found: Tensor, expected: Tensor, within: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= within * expected.abs().max()
