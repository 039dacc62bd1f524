"""Fused networks with squeeze-excite and curves, of which something is changed after `fuse`.

Each is held against the same layers, to which the same is done.
"""

import pickle
from copy import deepcopy

import cases
import pytest
import torch
from gated_networks import expect, gate_convolutions, lively
from same_answers import gradients, image, in_double, why_other_gradient
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn
from torchvision.models import mobilenet_v3_small
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.ops import SqueezeExcitation

import mnv2_kernels as mk

pytestmark = [
    pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension"),
    pytest.mark.usefixtures("one_thread"),
]

X = image(3, 3, 48, 40)


def efficientnet() -> nn.Module:
    settings = [MBConvConfig(1, 3, 1, 16, 8, 1), MBConvConfig(4, 5, 2, 8, 16, 2)]
    return EfficientNet(settings, 0.1, 0.0, num_classes=7, last_channel=40)


def mobilenet() -> nn.Module:
    return mobilenet_v3_small(width_mult=0.5, num_classes=7)


MODELS = {"efficientnet": efficientnet, "mobilenet": mobilenet}


@pytest.fixture(params=MODELS)
def pair(request):
    """The layers, and the same fused, which has run."""
    torch.manual_seed(0)
    plain = lively(MODELS[request.param]())
    fused = mk.fuse(plain)
    with torch.no_grad():
        fused(X)
    return plain, fused


def gates(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parent and name of every squeeze-excite."""
    kinds = SqueezeExcitation | SqueezeExcite
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, kinds)
    ]


def second(model: nn.Module) -> SqueezeExcitation:
    parent, name = gates(model)[1]
    return parent._modules[name]


def other_activation(model: nn.Module) -> None:
    for parent in [*model.modules()]:
        for name, child in parent._modules.items():
            if isinstance(child, nn.SiLU | nn.Hardswish):
                parent._modules[name] = nn.GELU()


def other_gate(model: nn.Module) -> None:
    parent, name = gates(model)[1]
    old = parent._modules[name]
    squeezed = old.fc1.out_channels + 1
    new = SqueezeExcitation(old.fc1.in_channels, squeezed, nn.SiLU, nn.Hardsigmoid)
    parent._modules[name] = new.eval()


def other_sigmoid(model: nn.Module) -> None:
    is_hard = isinstance(second(model).scale_activation, nn.Hardsigmoid)
    second(model).scale_activation = nn.Sigmoid() if is_hard else nn.Hardsigmoid()


def no_gate(model: nn.Module) -> None:
    parent, name = gates(model)[1]
    parent._modules[name] = nn.Identity()


CHANGES = {
    # What is done, and whether all blocks may stay fused.
    "squeeze scaled": (lambda m: second(m).fc1.weight.mul_(-1.5), True),
    "excitation scaled through data": (lambda m: second(m).fc2.weight.data.mul_(-1.5), True),
    "biases": (lambda m: (second(m).fc1.bias.add_(0.7), second(m).fc2.bias.sub_(1.1)), True),
    "one weight through numpy": (
        lambda m: second(m).fc2.weight.detach().numpy().fill(0.3),
        True,
    ),
    "parameter replaced": (
        lambda m: setattr(second(m).fc2, "weight", nn.Parameter(-second(m).fc2.weight)),
        True,
    ),
    "layer replaced": (
        lambda m: setattr(second(m), "fc2", deepcopy(second(m).fc2).apply(negate)),
        True,
    ),
    "norm before the gate": (lambda m: norms(m)[3].running_mean.add_(0.5), True),
    "gate replaced": (other_gate, True),
    "gate left out": (no_gate, True),
    "sigmoids": (other_sigmoid, True),
    "squeeze activation": (lambda m: setattr(second(m), "activation", nn.GELU()), True),
    "activations": (other_activation, True),
    "tanh gate": (lambda m: setattr(second(m), "scale_activation", nn.Tanh()), False),
    "hook on a gate": (
        lambda m: second(m).register_forward_hook(lambda m, x, y: 0.5 * y),
        False,
    ),
    "hook before a gate": (
        lambda m: second(m).register_forward_pre_hook(lambda m, x: (x[0] + 1,)),
        False,
    ),
    "hook on a layer of a gate": (
        lambda m: second(m).fc1.register_forward_hook(lambda m, x, y: y - 1),
        False,
    ),
    "pooling to another size": (
        lambda m: setattr(second(m), "avgpool", nn.AdaptiveMaxPool2d(1)),
        False,
    ),
    "training and back": (lambda m: (m.train(), m.eval()), True),
}


def negate(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.neg_()


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_is_followed(pair, name):
    plain, fused = pair
    change, stays = CHANGES[name]
    before = plain(X)
    for model in pair:
        torch.manual_seed(1)
        change(model)
    expected = expect(plain, X)
    if name != "training and back":
        assert cases.why_wrong(before, expected) is not None, "it changes nothing"
    with torch.autograd.profiler.profile() as profile:
        y = fused(X)
    for _ in range(2):
        assert (reason := cases.why_wrong(y, expected)) is None, reason
        y = fused(X)
    if stays:
        called = {event.key for event in profile.key_averages()}
        assert any(key.startswith("mnv2::") for key in called)


@torch.no_grad()
def test_two_changes_and_back(pair):
    plain, fused = pair
    right = fused(X)
    for model in pair:
        second(model).fc1.weight.neg_()
    changed = fused(X)
    assert cases.why_wrong(changed, expect(plain, X)) is None
    assert not torch.allclose(changed, right)
    for model in pair:
        second(model).fc1.weight.neg_()
    assert torch.equal(fused(X), right)


@torch.no_grad()
def test_copies_follow_their_own_weights(pair):
    plain, fused = pair
    right = fused(X)
    for copy in (deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copy(X), right)
        second(copy).fc2.bias.add_(2)
        assert not torch.allclose(copy(X), right)
        assert torch.equal(fused(X), right)
    assert torch.equal(mk.unfuse(fused)(X), plain(X))


def test_gradients_are_those_of_the_layers(pair):
    """In evaluation mode and in training mode, of every parameter and of x."""
    plain, fused = pair
    for training in (False, True):
        for model in pair:
            model.train(training)
        results = [gradients(model, lambda x: ((x,), {}), X) for model in pair]
        truth = gradients(in_double(plain), lambda x: ((x,), {}), X.double())
        names = results[0][2]
        assert len(gate_convolutions(deepcopy(plain), X)) >= 4 and len(names) > 20
        for name in ("x", *names):
            of_plain, of_fused, exact = (
                r[1] if name == "x" else r[2][name] for r in (*results, truth)
            )
            reason = why_other_gradient(of_fused, of_plain, exact)
            assert reason is None, f"{name}, training={training}: {reason}"


def test_gradients_of_x_alone_run_fused(pair):
    plain, fused = pair
    for model in pair:
        model.requires_grad_(False)
    results = [gradients(model, lambda x: ((x,), {}), X) for model in pair]
    truth = gradients(in_double(plain), lambda x: ((x,), {}), X.double())
    largest = truth[1].abs().max()
    error, eager = ((r[1].double() - truth[1]).abs().max() for r in (results[1], results[0]))
    assert error <= 4 * eager + 1e-5 * largest, (error, eager)


@torch.no_grad()
def test_modes(pair):
    """train() runs the layers, eval() the fused blocks; statistics move as the layers' do."""
    plain, fused = pair
    for model in pair:
        torch.manual_seed(3)
        model.train()
        model(X)
        model.eval()
    for (name, ours), theirs in zip(
        fused.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)
    assert cases.why_wrong(fused(X), expect(plain, X)) is None
