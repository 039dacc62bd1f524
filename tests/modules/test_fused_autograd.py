"""Derivatives through fused modules where parameters are swapped, cast or watched."""

import pytest
import torch
from foreign_blocks import largest_difference, randomise
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def blocks():
    """(plain, fused) in float32, and x."""
    block = randomise(TorchvisionBlock(8, 8, 1, 6))
    return block, mk.fuse(block), 2 * torch.randn(2, 8, 6, 6)


@pytest.mark.parametrize("swapped", ["conv.2.weight", "conv.1.1.running_mean"])
def test_gradients_are_those_of_the_tensors_of_the_forward_pass(blocks, swapped):
    plain, fused, x = blocks
    value = dict(plain.state_dict())[swapped].clone().mul_(1.5).add_(0.3)
    grads = []
    for module in (plain, fused):
        replacement = value.clone().requires_grad_(swapped.endswith("weight"))
        y = torch.func.functional_call(module, {swapped: replacement}, x)
        y.square().sum().backward()
        grads.append([p.grad for p in module.parameters() if p.grad is not None])
        grads[-1].append(replacement.grad)
    for ours, theirs in zip(*grads[::-1], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or largest_difference(ours, theirs) < 1e-4


def test_forward_mode_tangents(blocks):
    plain, fused, x = blocks
    weights, tangent = mk.fold(fused), torch.randn_like(x)
    expected = torch.func.jvp(plain, (x,), (tangent,))[1]
    found = torch.func.jvp(
        lambda t: mk.inverted_residual(t, weights, residual=True), (x,), (tangent,)
    )[1]
    assert largest_difference(found, expected) < 1e-4
    with torch.no_grad(), forward_ad.dual_level():
        y = fused(forward_ad.make_dual(x, tangent))
        assert largest_difference(forward_ad.unpack_dual(y).tangent, expected) < 1e-4


def test_backward_inside_autocast_is_float32(blocks):
    plain, fused, x = blocks
    for module in (plain, fused):
        module.zero_grad()
        y = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            y.square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert largest_difference(ours.grad, theirs.grad) < 1e-4, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_backward_of_triton_inside_autocast(blocks, dtype):
    """On a GPU, autocast's half-precision x runs fused with float32 parameters by itself."""
    plain, _, x = blocks
    fused = mk.fuse(plain, backend="triton")
    x = x.to(dtype)
    gradients = []
    for block in (plain, fused):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=block is fused):
            y = block(leaf if block is fused else leaf.float())
        y.float().sum().backward()
        gradients.append(leaf.grad.float())
        assert all(p.grad is not None for p in block.parameters())
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)


def test_backward_hook_registered_later_is_called(blocks):
    _, fused, x = blocks
    calls = []
    fused.conv[1][0].register_full_backward_hook(lambda *args: calls.append(args))
    fused(x.requires_grad_()).sum().backward()
    assert calls


def test_parametrization_registered_later_is_followed(blocks):
    _, fused, x = blocks
    with torch.no_grad():
        fused(x)
        parametrizations.weight_norm(fused.conv[2])
        assert fused.why_plain(x) is not None
        assert torch.equal(fused(x), fused.plain_forward(x))


def test_changed_eps_is_followed(blocks):
    plain, fused, x = blocks
    with torch.no_grad():
        fused(x)
        for module in (plain, fused):
            module.conv[3].eps = 0.5
        assert fused.why_plain(x) is None
        assert largest_difference(fused(x), plain(x)) < 1e-5


def test_replica_for_data_parallel_runs_its_own_parameters(blocks):
    _, fused, _ = blocks
    replica = fused._replicate_for_data_parallel()
    replica._modules["conv"] = "the replica's"
    assert replica.original._modules["conv"] == "the replica's"
    assert fused.original._modules["conv"] is fused._modules["conv"] != "the replica's"


@pytest.mark.parametrize("padding", [(3, 1, 1, 1), (1, 1, 1), (-1, 1, 1, 1), (0, 0, 0, 0)])
def test_padding_that_cannot_be(padding):
    with pytest.raises(ValueError, match="padding must"):
        mk.InvertedResidual(8, 8, padding=padding)
