"""freeze_bn: what it freezes, and fused blocks that train with frozen batch norms."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
from foreign_blocks import (
    Flat,
    flow,
    largest_difference,
    lukemelas,
)
from fused_pairs import make_pair
from same_answers import randomise
from torch import nn
from torch.nn import functional as F
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock
from torchvision.ops import FrozenBatchNorm2d

import mnv2_kernels as mk
from mnv2_kernels.ops.backends import ran
from mnv2_kernels.profiling.memory import live_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def networks() -> dict[str, nn.Module]:
    return {
        "own": mk.mobilenet_v2(0.35),
        "torchvision": torchvision.models.mobilenet_v2(width_mult=0.35),
        "timm": timm.create_model("mobilenetv2_050"),
        "norms of one dimension": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    }


@pytest.mark.parametrize("name", networks())
def test_norms_stay_in_evaluation_mode(name):
    model = networks()[name]
    before = copy.deepcopy(model)
    frozen = mk.freeze_bn(model)
    assert all(n.training for n in norms(model)), "the original is left alone"
    for copied in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        copied.train()
        assert copied.training and len(norms(copied)) == len(norms(before)) > 0
        for norm, original in zip(norms(copied), norms(before), strict=True):
            assert not norm.training and isinstance(norm, type(original))
            assert type(norm).__name__ == type(original).__name__ and "frozen" in repr(norm)
        assert copied.state_dict().keys() == before.state_dict().keys()
        copied.load_state_dict(before.state_dict())


def test_statistics_are_used_and_not_updated():
    block = randomise(TorchvisionBlock(8, 8, 1, 6))
    x = torch.randn(2, 8, 6, 6)
    frozen = mk.freeze_bn(block).train()
    state = copy.deepcopy(frozen.state_dict())
    assert torch.equal(frozen(x), block.eval()(x))
    assert all(torch.equal(t, state[name]) for name, t in frozen.state_dict().items())


def test_inplace_twice_and_a_norm_alone():
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert mk.freeze_bn(model, inplace=True) is model
    kind = type(model[0])
    assert type(mk.freeze_bn(model, inplace=True)[0]) is kind
    assert not mk.freeze_bn(nn.BatchNorm2d(3)).train().training


def test_affine_parameters_are_trained_or_not():
    model = networks()["own"]
    next(norms(model)[0].parameters()).requires_grad_(False)
    kept = mk.freeze_bn(model)
    assert [p.requires_grad for p in kept.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    still = mk.freeze_bn(model, train_affine=False)
    assert not any(p.requires_grad for n in norms(still) for p in n.parameters())
    assert all(m.weight.requires_grad for m in still.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3, track_running_stats=False), nn.LazyBatchNorm2d()]
)
def test_norms_without_statistics_are_refused(norm):
    model = nn.Sequential(nn.BatchNorm2d(3), norm)
    with pytest.raises(ValueError, match="freeze_bn: 1 must have running statistics, got"):
        mk.freeze_bn(model, inplace=True)
    assert model.train()[0].training, "nothing was changed"


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"freeze_bn: model must be a torch.nn.Module, got list"):
        mk.freeze_bn([])


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("order", ("freeze, then fuse", "fuse, then freeze", "fuse, then deepcopy"))
@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("family", ("own", "torchvision", "timm", "mnasnet"))
def test_blocks_train_fused(family, order, affine):
    plain, _ = make_pair(family)
    vars(plain).pop("forward", None)
    plain = mk.freeze_bn(plain, train_affine=affine)
    if order == "freeze, then fuse":
        fused = mk.fuse(plain, backend="reference")
    else:
        fused = mk.freeze_bn(mk.fuse(plain, backend="reference"), train_affine=affine)
    if order == "fuse, then deepcopy":
        fused = copy.deepcopy(fused)
    fused.train()
    x = 3 * torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert fused.training and fused.why_plain(x) is None
    original = copy.deepcopy(plain).train()
    if isinstance(original, mk.InvertedResidual):
        original.forward = original.plain_forward
    for ours, theirs in zip(gradients(fused, x), gradients(original, x), strict=True):
        assert largest_difference(ours, theirs) < 1e-11


def test_a_network_trains_fused_through_the_kernels(kernel_backend):
    """Stem, head and dropout are in training mode; all blocks run fused, forward and back."""
    plain = mk.freeze_bn(randomise(torchvision.models.mobilenet_v2(width_mult=0.35))).double()
    fused = mk.fuse(plain).float().train()
    blocks = [m for m in fused.modules() if hasattr(m, "why_plain")]
    assert len(blocks) == 17 and all(b.why_plain(torch.ones(1)) is None for b in blocks)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for model in (plain.train(), fused):
        model.classifier[0].eval()
    ours, theirs = gradients(fused, x.float()), gradients(plain, x)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().mean() < 1e-3 * b.abs().mean() + 1e-9


def test_unfused_blocks_are_frozen_too():
    fused = mk.fuse(mk.freeze_bn(TorchvisionBlock(8, 8, 1, 6)))
    original = mk.unfuse(fused).train()
    assert type(original) is TorchvisionBlock and not any(n.training for n in norms(original))


class DropsItself(Flat):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("build", (lambda: DropsItself(flow(), True), lukemelas))
def test_blocks_follow_what_their_forward_does_in_training_mode(build):
    """One drops values then; the other would, if it was called with a rate."""
    plain = mk.freeze_bn(randomise(build()))
    fused = mk.fuse(plain)
    assert fused.why_plain() is None
    drops = isinstance(plain, DropsItself)
    assert ("drops values" in (fused.train().why_plain() or "")) == drops
    x = torch.randn(2, 8, 6, 6)
    results = []
    for model in (fused, plain.train()):
        torch.manual_seed(3)
        results.append(model(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_one_norm_that_is_not_frozen():
    """It uses the statistics of the batch, the others their own."""
    plain = randomise(TorchvisionBlock(8, 8, 1, 6))
    fused = mk.fuse(plain).train()
    plain.train()
    x = torch.randn(4, 8, 6, 6)
    for module in (plain, fused):
        mk.freeze_bn(module.conv[0], inplace=True)
        module.conv[1][1].eval()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_frozen_block_compiles_whole(kernel_backend):
    torch._dynamo.reset()
    fused = mk.fuse(mk.freeze_bn(randomise(TorchvisionBlock(8, 8, 1, 6)))).train()
    x = torch.randn(2, 8, 6, 6)
    expected = gradients(fused, x)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_checkpoints_go_both_ways():
    frozen = mk.freeze_bn(mk.mobilenet_v2(0.35))
    file = io.BytesIO()
    torch.save(frozen.state_dict(), file)
    file.seek(0)
    mk.mobilenet_v2(0.35).load_state_dict(torch.load(file))


def test_memory_of_a_fine_tuning_step(kernel_backend):
    """Acceptance is 35 %; what is held here, gradients of all parameters included, is 15 %."""
    plain = mk.freeze_bn(torchvision.models.mobilenet_v2()).to(memory_format=torch.channels_last)
    fused = mk.fuse(plain)
    x = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    peaks = {}
    for name, model in (("plain", plain.train()), ("fused", fused.train())):
        peaks[name] = max(live_bytes(lambda model=model: model(x).sum().backward()))
    assert 0 < peaks["fused"] < 0.15 * peaks["plain"], peaks


@pytest.mark.parametrize("exchanged", (nn.Identity(), FrozenBatchNorm2d(48)))
def test_a_norm_taken_out_while_it_trained_is_asked_no_more(exchanged):
    block = randomise(mk.InvertedResidual(8, 8)).train()
    block.conv[0][1] = exchanged
    block.eval()
    before = ran()
    with torch.no_grad():
        block(torch.randn(2, 8, 6, 6))
    assert sum((ran() - before).values()) == 1
