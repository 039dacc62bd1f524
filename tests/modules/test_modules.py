"""What may happen to a fused module in its life: copies, dtypes, modes, weights that change."""

import copy
import io
import pickle

import pytest
import torch
import torchvision
from foreign_blocks import (
    Flat,
    flow,
    largest_difference,
)
from fused_pairs import assert_same, image
from same_answers import randomise
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk
from mnv2_kernels.modules.fused_module import FusedInvertedResidual

pytestmark = pytest.mark.usefixtures("one_thread")


def change_all(block, change):
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            change(parameter, i)


def test_cached_weights_are_used_again(pair):
    _, fused = pair
    with torch.no_grad():
        assert fused.folded_arguments() is fused.folded_arguments()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_is_complete_and_independent(pair, again):
    block, fused = pair
    if "forward" in vars(block):
        block = copy.deepcopy(block)
    with torch.no_grad():
        fused(image())
        other = again(fused)
        assert_same(block, other)
        change_all(other, lambda p, i: p.mul_(1.5))
        assert_same(block, fused)
        assert largest_difference(other(image()), block(image())) > 1e-3
    if isinstance(fused, FusedInvertedResidual):
        assert other._modules is other.original._modules


def test_whole_model_through_torch_save():
    model = mk.fuse(randomise(torchvision.models.mobilenet_v2(width_mult=0.35)))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))


def test_state_dict_both_ways(pair):
    block, fused = pair
    assert list(fused.state_dict()) == list(block.state_dict())
    with torch.no_grad():
        fused(image())
        change_all(block, lambda p, i: p.mul_(1.1))
        randomise(block)
        assert fused.load_state_dict(block.state_dict()).missing_keys == []
        assert_same(block, fused)
        change_all(fused, lambda p, i: p.mul_(0.9))
        block.load_state_dict(fused.state_dict())
        assert_same(block, fused)


def test_load_state_dict_by_assignment(pair):
    block, fused = pair
    with torch.no_grad():
        fused(image())
        change_all(block, lambda p, i: p.mul_(1.1))
        fused.load_state_dict(copy.deepcopy(block.state_dict()), assign=True)
        assert_same(block, fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_change_of_dtype(pair, dtype):
    block, fused = pair
    with torch.no_grad():
        fused(image())
        x = image(dtype)
        block.to(dtype), fused.to(dtype)
        y = fused(x)
        assert y.dtype == fused.folded_arguments()[2].dtype == dtype
        assert largest_difference(y.double(), block(x).double()) < 30 * torch.finfo(dtype).eps
        # Back in float64 with the rounded values.
        block.double(), fused.double()
        assert_same(block, fused)


def test_to_meta(pair):
    _, fused = pair
    with torch.no_grad():
        fused(image())
        fused.to("meta")
        y = fused(torch.empty(3, 8, 5, 5, device="meta", dtype=torch.float64))
    assert (y.device.type, y.shape) == ("meta", (3, 8, 5, 5))


def test_inner_module_moved_alone(pair):
    block, fused = pair
    with torch.no_grad():
        fused(image())
        for module in (block, fused):
            next(m for m in module.modules() if isinstance(m, nn.Conv2d)).float().double()
        assert_same(block, fused)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
    ids=["sgd", "foreach", "fused"],
)
def test_optimizer_step(pair, make):
    block, fused = pair
    x = image()
    with torch.no_grad():
        before = fused(x)
    for module in (block, fused):
        optimizer = make(module.parameters())
        module(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert largest_difference(fused(x), before) > 1e-3
        assert largest_difference(fused(x), block(x)) < 1e-8


def test_changes_in_place_are_seen(pair):
    block, fused = pair
    names = [n for n, t in fused.state_dict().items() if t.is_floating_point()]
    x = image()
    with torch.no_grad():
        for name in names:
            before = fused(x)
            for module in (block, fused):
                module.state_dict()[name].mul_(1.3).add_(0.1)
            assert_same(block, fused, x)
            assert largest_difference(fused(x), before) > 1e-6, name


def test_new_data_is_seen(pair):
    block, fused = pair
    with torch.no_grad():
        for factor in (0.7, 1.3, 1.1):
            fused(image())
            for module in (block, fused):
                for parameter in module.parameters():
                    parameter.data = parameter.data * factor
            assert_same(block, fused)


def test_new_data_at_the_address_of_what_was_folded_is_seen(pair):
    block, fused = pair
    with torch.no_grad():
        for parameter, other in zip(fused.parameters(), block.parameters(), strict=True):
            fused(image())
            # The memory of the old data is free for the new one.
            for factor in (1.1, 1.1):
                new = parameter.data.tolist()
                parameter.data = torch.empty(0)
                parameter.data = factor * torch.tensor(new, dtype=torch.float64)
                other.data = other.data * factor
            assert_same(block, fused)


def test_change_through_data_is_seen_after_eval(pair):
    block, fused = pair
    with torch.no_grad():
        fused(image())
        for module in (block, fused):
            for parameter in module.parameters():
                parameter.data.mul_(1.1)
            module.eval()
        assert_same(block, fused)


def test_new_parameter_is_seen(pair):
    block, fused = pair
    with torch.no_grad():
        fused(image())
        for module in (block, fused):
            conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
            conv.weight = nn.Parameter(conv.weight * 2)
        assert_same(block, fused)


def test_training_updates_statistics_as_the_plain_block(pair):
    block, fused = pair
    with torch.no_grad():
        fused(image())
    x = image()
    for module in (block, fused):
        module.train()
    torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-4)
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
    for module in (block, fused):
        module.eval()
    with torch.no_grad():
        assert_same(block, fused)


def test_mode_reaches_the_children_and_the_original():
    block = TorchvisionBlock(8, 8, 1, 6)
    fused = mk.fuse(block, inplace=True)
    fused.eval()
    assert not any(m.training for m in block.modules())
    fused.train()
    assert all(m.training for m in block.modules())


def test_norms_in_evaluation_mode_in_a_training_model(pair):
    """The rest of the block does nothing else then."""
    block, fused = pair
    x = image()
    for module in (block, fused):
        module.train()
        for inner in module.modules():
            if isinstance(inner, nn.BatchNorm2d):
                inner.eval()
    with torch.no_grad():
        assert_same(block, fused, x)


def test_gradients_are_those_of_the_plain_block(pair):
    block, fused = pair
    x = image()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    weight = torch.randn_like(x)
    for module, value in zip((block, fused), inputs, strict=True):
        (module(value) * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    theirs = dict(block.named_parameters())
    for name, parameter in fused.named_parameters():
        assert theirs[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)


def test_frozen_parameters(pair):
    block, fused = pair
    for module in (block, fused):
        module.requires_grad_(False)
    x = image().requires_grad_()
    y = fused(x)
    assert fused.folded_arguments() is fused.folded_arguments()
    (ours,) = torch.autograd.grad(y.sum(), x)
    (theirs,) = torch.autograd.grad(block(x).sum(), x)
    torch.testing.assert_close(ours, theirs)
    last = list(fused.parameters())[-1].requires_grad_()
    fused(image()).sum().backward()
    assert last.grad.abs().max() > 0


def test_inference_mode(pair):
    block, fused = pair
    with torch.inference_mode():
        assert_same(block, fused)
    # What was cached there is good for gradients too.
    x = image().requires_grad_()
    fused.requires_grad_(False)
    fused(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_weights_that_are_inference_tensors():
    with torch.inference_mode():
        block = randomise(TorchvisionBlock(8, 8, 1, 6)).double()
    fused = mk.fuse(block, backend="reference", inplace=True)
    x = image()
    with torch.no_grad():
        assert largest_difference(fused(x), block(x)) < 1e-11
    with torch.inference_mode():
        assert largest_difference(fused(x), block(x)) < 1e-11
        block.conv[2].weight = nn.Parameter(2 * block.conv[2].weight, requires_grad=False)
        assert largest_difference(fused(x), block(x)) < 1e-11


def test_input_is_not_changed_by_inplace_activations(pair):
    _, fused = pair
    x = image()
    before = x.clone()
    with torch.no_grad():
        fused(x)
    assert torch.equal(x, before)


def test_no_backend_and_no_kernel_runs_plain():
    """float64 has no kernel but the reference, which is not chosen over the plain layers."""
    block = randomise(Flat(flow(), True)).double()
    fused = mk.fuse(block)
    x = image()
    assert "float32" in fused.why_plain(x) or "extension" in fused.why_plain(x)
    assert torch.equal(fused(x), block(x))
