"""torch.func and autograd over fused models: the derivatives and batches of the plain layers."""

import copy

import pytest
import torch
from closeness import close
from same_answers import randomise
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

pytestmark = pytest.mark.usefixtures("kernel_backend", "one_thread")

PARAMETER = "1.conv.2.weight"


def network() -> nn.Module:
    return randomise(nn.Sequential(TorchvisionBlock(4, 4, 1, 6), TorchvisionBlock(4, 8, 2, 6)))


@pytest.fixture
def networks():
    """(plain, fused) and images."""
    plain = network()
    return plain, mk.fuse(plain), torch.randn(3, 4, 7, 6)


def parameters_of(model) -> dict:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def test_functional_call_with_other_parameters(networks):
    plain, fused, x = networks
    other = network().state_dict()
    before = plain(x)
    close(functional_call(fused, other, (x,)), functional_call(plain, other, (x,)))
    assert (functional_call(fused, other, (x,)) - before).abs().max() > 1e-2
    close(fused(x), before)


def loss(model, state, x):
    return functional_call(model, state, (x,)).square().sum()


@pytest.mark.parametrize(
    "transform",
    {
        "vmap over images": lambda m, s, x: vmap(m)(x[:, None]),
        "grad": lambda m, s, x: grad(lambda s: loss(m, s, x))(s)[PARAMETER],
        "grad of x": lambda m, s, x: grad(lambda x: loss(m, s, x))(x),
        "gradient of every image": lambda m, s, x: vmap(
            grad(lambda s, x: loss(m, s, x[None])), in_dims=(None, 0)
        )(s, x)[PARAMETER],
        "vjp": lambda m, s, x: vjp(m, x)[1](torch.ones(3, 8, 4, 3))[0],
        "jvp": lambda m, s, x: jvp(m, (x,), (torch.ones_like(x),))[1],
        "jvp of parameters": lambda m, s, x: jvp(
            lambda w: functional_call(m, {PARAMETER: w}, (x,)), (s[PARAMETER],), (s[PARAMETER],)
        )[1],
        "jacrev": lambda m, s, x: jacrev(lambda x: m(x).sum((2, 3)))(x),
        "second derivative": lambda m, s, x: grad(
            lambda x: grad(lambda x: loss(m, s, x))(x).square().sum()
        )(x),
    }.items(),
    ids=lambda item: item[0],
)
def test_transform(networks, transform):
    plain, fused, x = networks
    name, function = transform
    for requires_grad in (True, False):
        for model in (plain, fused):
            model.requires_grad_(requires_grad)
        with torch.no_grad():
            fused(x)
        expected = function(plain, parameters_of(plain), x)
        assert expected.abs().max() > 1e-2, name
        close(function(fused, parameters_of(fused), x), expected)


def test_ensemble(networks):
    """Parameters of several models in one batch."""
    plain, fused, x = networks
    results = []
    for model in (plain, fused):
        members = [model, copy.deepcopy(model)]
        with torch.no_grad():
            members[1].get_parameter(PARAMETER).mul_(2)
        parameters, buffers = stack_module_state(members)
        ensemble = vmap(lambda p, b, x, m=model: functional_call(m, (p, b), (x,)), (0, 0, None))
        results.append(ensemble(parameters, buffers, x))
        close(results[-1][1], members[1](x))
    close(*results)


def test_tangents_of_parameters_in_forward_mode(networks):
    """Also where folded weights are cached, which have none."""
    plain, fused, x = networks
    tangents = []
    for model in (plain, fused):
        with torch.no_grad():
            model(x)
            value = model.get_parameter(PARAMETER).detach()
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(value, torch.ones_like(value))
                y = functional_call(model, {PARAMETER: dual}, (x,))
                tangents.append(forward_ad.unpack_dual(y).tangent)
    assert tangents[0].abs().max() > 1e-2
    close(*tangents)


def test_second_derivatives_by_backward_are_refused(networks):
    """Also where the gradient of y needs none itself: then they would be zeros in silence."""
    plain, fused, x = networks
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    second = []
    for model in (plain, mk.fuse(plain, backend="reference")):
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    close(*second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(networks, reentrant):
    plain, fused, x = networks
    images = [x.clone().requires_grad_() for _ in range(2)]
    plain(images[0]).square().sum().backward()
    checkpoint(fused, images[1], use_reentrant=reentrant).square().sum().backward()
    close(images[1].grad, images[0].grad)
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
