"""What is edited in a model that is fused already: the next call runs the edited layers."""

import copy
from types import MethodType

import numpy as np
import pytest
import torch
from forwards import Copied
from fused_states import (
    FEATURES,
    IMAGE,
    STATES,
    check,
    make_pair,
    small_network,
    states,
)
from same_answers import enliven, image
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

pytestmark = [pytest.mark.sampled(2), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(params=STATES)
def pair(request):
    """(the layers, the same fused and called twice, x), in evaluation mode."""
    return make_pair(request.param)


@pytest.fixture
def trained():
    torch.manual_seed(0)
    return enliven(small_network(), IMAGE)


def test_hooks_are_called_and_forgotten(pair):
    """A hook on any convolution sees the values, may change them, and is gone when removed."""
    plain, fused, x = pair
    name = [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)][1]
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        seen = {}
        handles = []
        for model in (plain, fused):

            def hook(module, args, *result, model=model, seen=seen):
                seen.setdefault(model, (result or args)[0].clone())
                return (result or args)[0] * 2

            handles.append(getattr(model.get_submodule(name), register)(hook))
        check(plain, fused, x, register)
        torch.testing.assert_close(seen[fused], seen[plain], rtol=1e-4, atol=1e-4)
        for handle in handles:
            handle.remove()
        check(plain, fused, x, "removed")
        assert states(fused) == {"fused"}


def edit(do, stays_fused=False):
    return pytest.param(do, stays_fused, id=do.__name__)


def conv_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def depthwise(model):
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)


def equal_child(model):
    name = conv_names(model)[1]
    model.set_submodule(name, copy.deepcopy(model.get_submodule(name)))


def other_activation(model):
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ReLU6))
    model.set_submodule(name, nn.Mish())


def relu_for_relu6(model):
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ReLU6))
    model.set_submodule(name, nn.ReLU())


def other_bound(model):
    next(m for m in model.modules() if isinstance(m, nn.ReLU6)).max_val = 0.5


def other_norm(model):
    name, norm = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    model.set_submodule(name, nn.GroupNorm(1, norm.num_features))


def no_norm(model):
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    model.set_submodule(name, nn.Identity())


def dilated(model):
    conv = depthwise(model)
    conv.dilation, conv.padding = (2, 2), (2, 2)


def reflecting(model):
    conv = depthwise(model)
    conv.padding_mode, conv._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


def function_of_a_layer(model):
    conv = depthwise(model)
    conv.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), conv)


def function_of_the_model(model):
    plain = type(model).forward
    model.forward = MethodType(lambda self, x: 2 * plain(self, x), model)


def function_of_the_class_in_between(model):
    model.__class__ = type("Doubled", (type(model),), {"forward": lambda self, x: x + 1})


EDITS = [
    edit(equal_child, True),
    edit(relu_for_relu6, True),
    edit(other_bound),
    edit(other_activation),
    edit(other_norm),
    edit(no_norm),
    edit(dilated),
    edit(reflecting),
    edit(function_of_a_layer),
    edit(function_of_the_model),
    edit(function_of_the_class_in_between),
]


@pytest.mark.parametrize(("do", "stays_fused"), EDITS)
def test_edits_after_fuse_are_followed(pair, do, stays_fused):
    """The next call runs the edited layers; what is still a block is still fused."""
    plain, fused, x = pair
    for model in (plain, fused):
        do(model)
    check(plain, fused, x)
    if stays_fused:
        assert states(fused) == {"fused"}, str(mk.explain(fused))


@pytest.mark.parametrize("build", [Copied, lambda: TorchvisionBlock(8, 8, 1, 3)])
def test_a_flag_that_is_changed_after_fuse(build):
    """Off, on again, and by values that are as good as True."""
    torch.manual_seed(0)
    plain = enliven(build(), FEATURES)
    fused = mk.fuse(plain)
    check(plain, fused, FEATURES)
    for flag in (False, True, 0, 1, np.bool_(False), np.bool_(True)):
        plain.use_res_connect = fused.use_res_connect = flag
        check(plain, fused, FEATURES, f"{flag!r}")
        assert states(fused) == {"fused"}, str(mk.explain(fused))


def test_flags_inside_a_network_are_changed_after_fuse(trained):
    fused = mk.fuse(trained)
    check(trained, fused, IMAGE)
    for flag in (False, True):
        for model in (trained, fused):
            model.features[3].use_res_connect = flag
        check(trained, fused, IMAGE, f"{flag!r}")
        assert states(fused) == {"fused"}


def test_blocks_inside_a_network_are_replaced_after_fuse(trained):
    """By another block, by a fused one, by something else; the network follows."""
    fused = mk.fuse(trained)
    check(trained, fused, IMAGE)
    channels = trained.features[3].conv[2].out_channels
    block = enliven(TorchvisionBlock(channels, channels, 1, 6), image(2, channels, 8, 8))
    for other in (block, mk.fuse(block), nn.Identity(), nn.ReLU(), copy.deepcopy(block)):
        trained.features[3] = copy.deepcopy(mk.unfuse(other))
        fused.features[3] = other
        check(trained, fused, IMAGE, type(other).__name__)
