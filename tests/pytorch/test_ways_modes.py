"""Modes that a model may run in: autocast, inference, determinism, profiler, counters."""

import copy

import pytest
import torch
from closeness import close
from foreign_blocks import (
    largest_difference,
)
from same_answers import randomise
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk
from mnv2_kernels.ops.backends import ran

pytestmark = pytest.mark.usefixtures("kernel_backend", "one_thread")


class Network(nn.Module):
    """A convolution, whose weights are in NCHW, and two blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.residual = TorchvisionBlock(8, 8, 1, 6)
        self.halving = TorchvisionBlock(8, 16, 2, 6)

    def forward(self, x):
        return self.halving(self.residual(self.stem(x)))


@pytest.fixture
def networks():
    """(plain, fused) and images."""
    plain = randomise(Network())
    return plain, mk.fuse(plain), torch.randn(2, 3, 18, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_no_less_exact_than_the_layers(networks, dtype, grad):
    plain, fused, x = networks
    exact = copy.deepcopy(plain).double()
    truth = exact(x.double())
    exact.zero_grad()
    truth.sum().backward()
    exact_gradient = _gradient(exact)
    eps, results, gradients = torch.finfo(dtype).eps, [], []
    for model in (plain, fused):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype):
            y = model(x)
        assert y.dtype == dtype
        results.append(largest_difference(y.double(), truth))
        if grad:
            y.float().sum().backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
            gradients.append((_gradient(model) - exact_gradient).norm())
    assert results[1] <= 2 * results[0] + eps * truth.abs().max()
    if grad:
        # As a whole: where a value is so near a clip that rounding decides, one element jumps.
        assert gradients[1] <= 2 * gradients[0] + eps * exact_gradient.norm()


def _gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_precision_models(networks, dtype):
    plain, fused, x = networks
    truth = copy.deepcopy(plain).double()(x.double())
    method = {torch.float16: "half", torch.bfloat16: "bfloat16"}[dtype]
    for model in (plain, fused):
        getattr(model, method)()
    errors = [largest_difference(m(x.to(dtype)).double(), truth) for m in (plain, fused)]
    assert fused(x.to(dtype)).dtype == dtype
    assert errors[1] <= 2 * errors[0]


@torch.inference_mode()
def test_both_memory_formats(networks):
    plain, fused, x = networks
    expected = plain(x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        fused.to(memory_format=memory_format)
        y = fused(x.contiguous(memory_format=memory_format))
        close(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert fused.residual.why_plain(fused.stem(x)) is None


def test_inference_mode_and_gradients_take_turns(networks):
    plain, fused, x = networks
    gradients = []
    for model in (plain, fused):
        with torch.inference_mode():
            close(model(x), plain(x))
        model.zero_grad()
        model(x).sum().backward()
        with torch.inference_mode():
            close(model(x), plain(x))
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_deterministic_algorithms_are_enough(networks):
    """Nothing is refused, and a training step gives the same bits every time."""
    _, fused, x = networks
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(3):
            fused.zero_grad()
            image = x.clone().requires_grad_()
            y = fused(image)
            y.square().sum().backward()
            results.append([y, image.grad, *(p.grad for p in fused.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    for again in results[1:]:
        assert all(map(torch.equal, again, results[0]))


@torch.no_grad()
def test_profiler_shows_a_range_for_every_block(networks):
    _, fused, x = networks
    names = ["mnv2_kernels::8x48x8-s1-k3", "mnv2_kernels::8x48x16-s2-k3"]
    for training in (False, True):
        fused.train(training)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fused(x)
        events = profile.events()
        for name in names:
            (block,) = [e for e in events if e.name == name]
            kernels = [
                e
                for e in events
                if e.name == "mnv2::inverted_residual"
                and block.time_range.start <= e.time_range.start <= block.time_range.end
            ]
            assert len(kernels) == (0 if training else 1)


def count(model, x) -> tuple[int, int]:
    """FLOPs of a forward pass, and of the backward pass after it."""
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward, counter.get_total_flops() - forward


def test_flop_counter_forward_and_backward(networks):
    plain, fused, x = networks
    assert count(fused, x)[0] == count(plain, x)[0]
    blocks = nn.Sequential(fused.residual, fused.halving)
    image = torch.randn(2, 8, 9, 9)
    # The counter has hooks on all modules, so that the layers run: as the original counts, also
    # backwards.
    layers = mk.unfuse(blocks)
    for wants_grad in (False, True):
        x = image.clone().requires_grad_(wants_grad)
        assert count(blocks, x) == count(layers, x)
    blocks.requires_grad_(False), layers.requires_grad_(False)
    x = image.clone().requires_grad_()
    assert count(blocks, x) == count(layers, x)


@torch.no_grad()
def test_averaged_model(networks):
    plain, fused, x = networks
    averaged = [AveragedModel(model) for model in (plain, fused)]
    for average, model in zip(averaged, (plain, fused), strict=True):
        average(x)
        average.update_parameters(model)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        average.update_parameters(model)
    close(averaged[1](x), averaged[0](x))
    assert largest_difference(averaged[1](x), fused(x)) > 1e-2


@torch.no_grad()
def test_tensor_subclass_keeps_its_kind(networks):
    plain, fused, x = networks
    y = fused(TwoTensor(x, 2 * x))
    assert type(y) is TwoTensor
    close(y.a, plain(x))
    close(y.b, plain(2 * x))


@torch.no_grad()
def test_parameters_of_a_subclass_are_never_cached(networks):
    """Wrappers have no address and may share a version: each looks like the one before."""
    plain, fused, x = networks
    weight = fused.residual.conv[2].weight
    for factor in (1.0, 2.0, 3.0):
        scaled = weight.detach() * factor
        fused.residual.conv[2].weight = nn.Parameter(TwoTensor(scaled, scaled))
        plain.residual.conv[2].weight = nn.Parameter(scaled)
        y = fused(x)
        close(y.a if isinstance(y, TwoTensor) else y, plain(x))


@torch.no_grad()
def test_weights_shared_between_blocks(networks):
    plain, fused, x = networks
    for model in (plain, fused):
        block = TorchvisionBlock(8, 8, 1, 6).eval()
        model.twin = mk.fuse(block) if model is fused else block
        for ours, theirs in zip(model.twin.parameters(), model.residual.parameters(), strict=True):
            ours.copy_(theirs)
        model.twin.load_state_dict(model.residual.state_dict())
        model.twin.conv[2].weight = model.residual.conv[2].weight
    for factor in (1.0, 0.5):
        for model in (plain, fused):
            model.residual.conv[2].weight.mul_(factor)
        h = plain.stem(x)
        before = ran()
        close(fused.twin(fused.residual(h)), plain.twin(plain.residual(h)))
        assert (ran() - before).total() == 2
