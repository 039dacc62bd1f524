"""Derivatives through fused modules where parameters are swapped, cast or watched."""

from copy import deepcopy

import cases
import pytest
import torch
from foreign_blocks import (
    largest_difference,
)
from same_answers import randomise
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk
from mnv2_kernels.block.fold import fold_layers
from mnv2_kernels.modules import autograd
from mnv2_kernels.ops.backends import ran

pytestmark = pytest.mark.usefixtures("one_thread")
compiled = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)


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


def convs_and_norms(block):
    return [(m[0], m[1]) for m in (block.conv[0], block.conv[1], [*block.conv][2:])]


def six_tensors(conv, norm):
    """As in `StageTensors`."""
    return conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var


@pytest.fixture
def asked(monkeypatch):
    """needs_grad of every call of the compiled backward pass."""
    calls = []
    original = autograd.asked_for

    def spy(*args):
        calls.append(list(original(*args)))
        return calls[-1]

    monkeypatch.setattr(autograd, "asked_for", spy)
    return calls


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda y, m, x: torch.autograd.grad(y, x), [0]),
        (lambda y, m, x: torch.autograd.grad(y, m.conv[2].weight), [13]),
        (lambda y, m, x: torch.autograd.grad(y, [m.conv[3].bias, m.conv[0][1].weight]), [3, 16]),
        (lambda y, m, x: y.backward(inputs=[m.conv[1][0].weight]), [7]),
        (lambda y, m, x: y.backward(inputs=[x]), [0]),
        (lambda y, m, x: y.backward(), [0, 1, 3, 4, 7, 9, 10, 13, 15, 16]),
    ],
    ids=["x", "a weight", "two vectors", "backward of a weight", "backward of x", "everything"],
)
@compiled
def test_only_what_is_asked_for_is_computed(blocks, asked, ask, expected):
    _, fused, x = blocks
    x.requires_grad_()
    ask(fused(x).sum(), fused, x)
    assert [i for i, needs in enumerate(asked[0]) if needs] == expected


@compiled
def test_gradient_of_what_came_before(blocks, asked):
    """Not of a leaf: of a tensor between two blocks, of which a hook wants to know too."""
    plain, fused, x = blocks
    found = []
    for block in (plain, fused):
        seen = []
        middle = block(x.clone().requires_grad_())
        middle.register_hook(seen.append)
        found.append([torch.autograd.grad(block(middle).sum(), middle)[0], *seen])
    assert largest_difference(found[1][0], found[0][0]) < 1e-4
    assert torch.equal(*found[1])
    assert asked == [[True] + [False] * 18]


@pytest.mark.parametrize("reentrant", (False, True))
def test_backward_through_checkpoints(blocks, reentrant):
    plain, fused, x = blocks
    for block in (plain, fused):
        block.zero_grad()
        y = checkpoint(block, x.clone().requires_grad_(), use_reentrant=reentrant)
        y.square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert largest_difference(ours.grad, theirs.grad) < 1e-4, name


def test_a_block_that_is_called_twice_and_asked_twice(blocks):
    plain, fused, x = blocks
    found = []
    for block in (plain, fused):
        leaf = x.clone().requires_grad_()
        y = block(block(leaf)).sum()
        parameters = list(block.parameters())
        for wanted in ([leaf], parameters, [leaf, leaf, *parameters]):
            found.append(torch.autograd.grad(y, wanted, retain_graph=True))
    for ours, theirs in zip(found[3:], found[:3], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert largest_difference(a, b) < 1e-4


@pytest.mark.parametrize("by", (pytest.param("kernel", marks=compiled), "stages"))
@pytest.mark.parametrize("with_biases", (False, True))
def test_every_tensor_of_the_layers(monkeypatch, by, with_biases):
    """Statistics too; alone and together, against autograd through the folding in float64."""
    if by == "stages":
        monkeypatch.setattr(autograd, "_is_compiled", lambda *args: False)
    block = randomise(TorchvisionBlock(8, 8, 1, 6))
    if with_biases:
        for conv, _ in convs_and_norms(block):
            conv.bias = torch.nn.Parameter(torch.randn(conv.out_channels))
    fused, x = mk.fuse(block), torch.randn(3, 8, 5, 6)
    truth = deepcopy(fused).double()
    stages = [autograd.StageTensors(*six_tensors(c, n), n.eps) for c, n in convs_and_norms(block)]
    arguments = fused.folded_arguments()
    exact = [t for pair in convs_and_norms(truth) for t in six_tensors(*pair)]
    present = [i for i, t in enumerate(exact) if t is not None]
    for i in present:
        exact[i].requires_grad_()
    # The layers have no gradients of the statistics, their folding has.
    folded = fold_layers(truth.block_layers)
    y = mk.inverted_residual(x.double(), folded, residual=True, backend="reference")
    grad_y = torch.randn_like(y)
    right = dict(
        zip(present, torch.autograd.grad(y, [exact[i] for i in present], grad_y), strict=True)
    )
    for chosen in (*([i] for i in present), present):
        leaves = [t if t is None else t.detach().clone() for s in stages for t in s[:6]]
        for i in chosen:
            leaves[i].requires_grad_()
        ours = [
            autograd.StageTensors(*leaves[6 * i : 6 * i + 6], s.eps) for i, s in enumerate(stages)
        ]
        result = autograd.run_with_gradients("cpu", x, arguments, ours)
        found = torch.autograd.grad(result, [leaves[i] for i in chosen], grad_y.float())
        for i, gradient in zip(chosen, found, strict=True):
            assert gradient.dtype == torch.float32 and gradient.is_contiguous()
            assert largest_difference(gradient, right[i].float()) < 1e-4, (i, chosen)


@compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_folding_without_a_graph_gives_the_same_bits(dtype):
    for config in ((8, 8, 1, 6), (19, 33, 2, 1), (40, 72, 1, 6)):
        block = randomise(TorchvisionBlock(*config)).to(dtype)
        fused = mk.fuse(block)
        with torch.no_grad():
            expected = fold_layers(fused.block_layers).tensors()
            found = autograd.fold_without_graph(fused.block_layers).tensors()
        for ours, theirs in zip(found, expected, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


@compiled
def test_a_step_of_an_optimizer_is_seen_by_the_next_forward_pass(blocks):
    plain, fused, x = blocks
    for block in (plain, fused):
        optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            block(x).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert largest_difference(ours, theirs) < 1e-5


def test_float64_runs_the_layers(blocks):
    plain, fused, x = (t.double() for t in blocks)
    before = ran()
    assert torch.equal(fused(x), plain(x))
    assert ran() == before
