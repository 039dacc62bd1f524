"""fuse, unfuse, fold and explain on whole models and on single blocks."""

import pytest
import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from foreign_blocks import (
    Flat,
    flow,
    largest_difference,
)
from same_answers import randomise
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk
from mnv2_kernels.modules import folded
from mnv2_kernels.modules.fused_module import FusedInvertedResidual, FusedModule
from mnv2_kernels.ops.backends import ran

pytestmark = [pytest.mark.sampled(2), pytest.mark.usefixtures("one_thread")]


def mobilenet(width=0.35):
    return randomise(torchvision.models.mobilenet_v2(width_mult=width, num_classes=10))


def fused_blocks(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedModule)}


def tensors_of(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def assert_same_tensors(first, second):
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# name: (model, blocks that are fused, blocks that are declined)
MODELS = {
    "torchvision-0.35": (lambda: mobilenet(0.35), 17, 0),
    "torchvision-0.5": (lambda: mobilenet(0.5), 17, 0),
    "torchvision-1.0": (lambda: mobilenet(1.0), 17, 0),
    "torchvision-1.4": (lambda: mobilenet(1.4), 17, 0),
    "timm-050": (lambda: timm.create_model("mobilenetv2_050"), 17, 0),
    "timm-100": (lambda: timm.create_model("mobilenetv2_100"), 17, 0),
    "timm-140": (lambda: timm.create_model("mobilenetv2_140"), 17, 0),
    "timm-mobilenetv1": (lambda: timm.create_model("mobilenetv1_100"), 13, 0),
    "timm-lite0": (lambda: timm.create_model("efficientnet_lite0"), 16, 0),
    "timm-tf-lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), 16, 0),
    "mnasnet": (torchvision.models.mnasnet0_5, 17, 0),
    "torchvision-v3": (torchvision.models.mobilenet_v3_large, 15, 0),
    "lukemelas-lite0": (lambda: EfficientNet.from_name("efficientnet-lite0"), 16, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_network_answers_the_same(name):
    build, fused_count, declined_count = MODELS[name]
    model = randomise(build()).double()
    before = tensors_of(model)
    fused = mk.fuse(model, backend="reference")
    states = [row.state for row in mk.explain(fused)]
    assert (states.count("fused"), states.count("declined")) == (fused_count, declined_count)
    assert len(states) == fused_count + declined_count
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model.named_modules()]
    assert_same_tensors(before, fused.state_dict())
    x = torch.randn(1, 3, 33, 32, dtype=torch.float64)
    before = ran()
    with torch.no_grad():
        assert largest_difference(fused(x), model(x)) < 1e-9
    assert ran() - before == {"reference": fused_count}
    assert not fused_blocks(model)


def test_own_network_is_fused_already():
    model = mk.mobilenet_v2(0.35).eval()
    assert [row.state for row in mk.explain(mk.fuse(model, backend="reference"))] == ["fused"] * 17
    assert all(b.backend is None for b in fused_blocks(model).values())
    fused = mk.fuse(model, backend="reference", inplace=True)
    assert fused is model
    assert all(b.backend == "reference" for b in fused_blocks(model).values())
    # None changes nothing that was asked for before.
    mk.fuse(model, inplace=True)
    assert all(b.backend == "reference" for b in fused_blocks(model).values())
    assert mk.unfuse(model, inplace=True) is model
    assert len(fused_blocks(model)) == 17


def test_copies_unless_in_place():
    model = mobilenet()
    fused = mk.fuse(model)
    assert fused is not model
    assert fused.features[1].conv[0][0].weight is not model.features[1].conv[0][0].weight
    weight = model.features[1].conv[0][0].weight
    assert mk.fuse(model, inplace=True) is model
    assert len(fused_blocks(model)) == 17
    assert model.features[1].conv[0][0].weight is weight


def test_fusing_twice_is_no_different():
    model = mk.fuse(mobilenet())
    once = dict(model.named_modules())
    mk.fuse(model, inplace=True)
    assert dict(model.named_modules()) == once


def test_a_block_alone():
    block = randomise(TorchvisionBlock(8, 8, 1, 6))
    fused = mk.fuse(block, backend="reference")
    assert isinstance(fused, FusedInvertedResidual)
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(fused(x), block(x))
    assert type(mk.unfuse(fused)) is TorchvisionBlock
    assert mk.unfuse(mk.fuse(block, inplace=True), inplace=True) is block


def test_shared_block_stays_shared():
    block = randomise(TorchvisionBlock(8, 8, 1, 6))
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block, nn.ReLU()), "c": block})
    fused = mk.fuse(model)
    assert isinstance(fused["a"], FusedInvertedResidual)
    assert fused["a"] is fused["b"][0] is fused["c"]
    plain = mk.unfuse(fused)
    assert type(plain["a"]) is TorchvisionBlock
    assert plain["a"] is plain["b"][0] is plain["c"]


def test_unfuse_gives_the_original_back_with_the_weights_of_now():
    model = mobilenet()
    originals = dict(model.named_modules())
    fused = mk.fuse(model, backend="reference", inplace=True)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(0.01)
    now = tensors_of(fused)
    fused.train()
    plain = mk.unfuse(fused, inplace=True)
    assert dict(plain.named_modules()) == originals
    assert all(m.training for m in plain.modules())
    assert_same_tensors(now, plain.state_dict())


def test_unfused_is_bitwise_the_original():
    model = mobilenet()
    plain = mk.unfuse(mk.fuse(model))
    assert not fused_blocks(plain)
    assert str(plain) == str(model)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(plain(x), model(x))
    assert_same_tensors(tensors_of(model), plain.state_dict())


def test_unfuse_of_a_copy_leaves_the_fused_model():
    fused = mk.fuse(mobilenet())
    mk.unfuse(fused)
    assert len(fused_blocks(fused)) == 17


def test_container_may_be_sliced_after_fusing():
    """segmentation_models_pytorch cuts `features` at these indices."""
    model = mobilenet()
    fused = mk.fuse(model, backend="reference")
    assert len(fused.features) == len(model.features) == 19
    x = torch.randn(1, 3, 64, 64)
    y, z = x, x
    with torch.no_grad():
        for first, last in ((0, 2), (2, 4), (4, 7), (7, 14), (14, 19)):
            y, z = model.features[first:last](y), fused.features[first:last](z)
            torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-4)
    # torchvision's SSDLite and DeepLabV3 find the stages by this attribute.
    stages = [i for i, b in enumerate(fused.features) if getattr(b, "_is_cn", False)]
    assert stages == [2, 4, 7, 14]


def test_features_only_model():
    model = timm.create_model("mobilenetv2_050", features_only=True).eval()
    fused = mk.fuse(model, backend="reference")
    assert len(fused_blocks(fused)) == 17
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_declined_blocks_stay_and_their_neighbours_are_fused():
    hooked = randomise(Flat(flow(), True))
    hooked.conv[3].register_forward_hook(lambda *args: None)
    model = nn.Sequential(hooked, randomise(Flat(flow(), True)))
    mk.fuse(model, inplace=True)
    assert model[0] is hooked
    assert isinstance(model[1], FusedInvertedResidual)


@pytest.mark.parametrize("function", [mk.fuse, mk.unfuse, mk.explain, mk.fold])
def test_no_module(function):
    argument = "block" if function is mk.fold else "model"
    sentence = f"{function.__name__}: {argument} must be a torch.nn.Module, got list"
    with pytest.raises(TypeError, match=sentence):
        function([])


def test_no_such_backend():
    model = mobilenet()
    with pytest.raises(ValueError, match="fuse: backend must be one of cpu, .*got 'gpu'"):
        mk.fuse(model, backend="gpu", inplace=True)
    assert not fused_blocks(model)


class AddsOne(TorchvisionBlock):
    def forward(self, x):
        return super().forward(x) + 1


class NeedsEvenSize(TorchvisionBlock):
    """Like TensorFlow's SAME, computed where its children do not show it."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, x.shape[3] % 2)))


class PoolsFirst(TorchvisionBlock):
    def forward(self, x):
        return super().forward(nn.functional.max_pool2d(x, 2))


class ClipsLater(TorchvisionBlock):
    """Differs for large values only."""

    def forward(self, x):
        return super().forward(x.clamp(-20, 20))


@pytest.mark.parametrize("kind", [AddsOne, NeedsEvenSize, PoolsFirst, ClipsLater])
def test_what_children_do_not_show_is_computed(kind):
    """The block that the class inherits runs in one pass where it is all that `conv` does."""
    model = nn.ModuleDict({"good": TorchvisionBlock(8, 16, 1, 6), "odd": kind(8, 16, 1, 6)})
    randomise(model).double()
    fused = mk.fuse(model, verify=True, backend="reference")
    names = [row.name for row in mk.explain(fused) if row.state == "fused"]
    assert names[0] == "good"
    for height, width in ((12, 10), (9, 13), (13, 11)):
        x = 10 * torch.randn(2, 8, height, width, dtype=torch.float64)
        with torch.no_grad():
            assert largest_difference(fused["odd"](x), model["odd"](x)) < 1e-12
    assert type(mk.unfuse(fused)["odd"]) is kind


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("torchvision-0.35", torch.float32),
        ("torchvision-0.35", torch.bfloat16),
        ("timm-050", torch.float64),
        ("lukemelas-lite0", torch.float32),
    ],
)
def test_verify_passes_what_is_right(name, dtype):
    model = randomise(MODELS[name][0]()).to(dtype).train()
    fused = mk.fuse(model, backend="reference", verify=True)
    assert all(m.training for m in fused.modules())
    mk.fuse(fused, verify=True, inplace=True)


def test_verify_runs_the_backend_that_was_asked_for(monkeypatch):
    def wrong(backend, x, arguments):
        y = correct(backend, x, arguments)
        # The check in float64 runs the reference too.
        return y * 1.01 if (x.dtype, backend) == (torch.float32, "reference") else y

    correct = folded.run
    monkeypatch.setattr(folded, "run", wrong)
    with pytest.raises(ValueError, match="block 'features.1'"):
        mk.fuse(mobilenet(), backend="reference", verify=True)
    with pytest.raises(ValueError, match="block 'features.1'"):
        mk.fuse(mk.fuse(mobilenet(), backend="reference"), verify=True)
    mk.fuse(mobilenet(), verify=True)
    # As it was: modules, modes, tensors and the random numbers.
    model = mobilenet().train()
    before, generator = tensors_of(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="block 'features.1'"):
        mk.fuse(model, backend="reference", verify=True, inplace=True)
    assert not fused_blocks(model)
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_tensors(before, model.state_dict())


def test_verify_calls_no_hook_of_the_user():
    calls = []
    block = randomise(TorchvisionBlock(8, 8, 1, 6))
    block.register_forward_hook(lambda *args: calls.append(args))
    mk.fuse(block, backend="reference", verify=True)
    assert not calls


def test_fold():
    block = randomise(TorchvisionBlock(8, 16, 1, 6)).double()
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    for foldable in (block, mk.fuse(block)):
        weights = mk.fold(foldable)
        assert weights.w_expand.shape == (8, 48)
        assert weights.w_dw.shape == (3, 3, 48)
        assert weights.w_project.shape == (48, 16)
        y = mk.inverted_residual(x, weights, backend="reference")
        torch.testing.assert_close(y, block(x))
    own = mk.InvertedResidual(8, 16).eval()
    y = mk.inverted_residual(x.float(), mk.fold(own), backend="reference")
    torch.testing.assert_close(y, own.plain_forward(x.float()))


def test_fold_says_what_cannot_be_folded():
    with pytest.raises(ValueError, match="fold: Flat cannot be folded: mish is not supported"):
        mk.fold(Flat(flow(act=nn.Mish), True))
    with pytest.raises(ValueError, match="fold: Conv2d cannot be folded: expected one inverted"):
        mk.fold(nn.Conv2d(1, 1, 1))


def test_folded_weights_are_shown_by_their_shapes():
    shown = repr(mk.fold(TorchvisionBlock(8, 16, 2, 6).half().eval()))
    assert "dtype=torch.float16" in shown and "w_expand=(8, 48), b_expand=(48,)" in shown
    assert "w_dw=(3, 3, 48)" in shown and "clip_dw=(0.0, 6.0)" in shown and len(shown) < 300
    assert "w_expand=None" in repr(mk.fold(TorchvisionBlock(8, 16, 2, 1)))
