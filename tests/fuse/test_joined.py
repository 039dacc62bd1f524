"""Blocks that follow one another in a Sequential run as one call, and only where that is exact."""

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

import mnv2_kernels as mk
from benchmarks.harness import randomise_norms
from mnv2_kernels.fuse import live_network as joined
from mnv2_kernels.fuse.sequential import FusedSequential
from mnv2_kernels.ops.extension import missing

pytestmark = [
    pytest.mark.skipif(missing is not None, reason=f"no compiled kernels: {missing}"),
    pytest.mark.usefixtures("settled"),
]


@pytest.fixture
def calls(monkeypatch) -> list[Tensor]:
    """The x of every call that ran several layers."""
    seen = []
    run_plan = joined.run_plan

    def counted(x, *args):
        seen.append(x)
        return run_plan(x, *args)

    monkeypatch.setattr(joined, "run_plan", counted)
    return seen


def ready(model: nn.Module, *shape: int) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(model, torch.randn(4, *shape or (3, 64, 64)))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return ready(torchvision.models.mobilenet_v2(width_mult=0.5, num_classes=10))


@pytest.fixture
def model(original) -> nn.Module:
    return mk.fuse(original)


def expect(original: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(original).double()(x.double())


def assert_same(found: Tensor, expected: Tensor, within: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= within * expected.abs().max()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision": (lambda: torchvision.models.mobilenet_v2(width_mult=0.35), 1),
    "mnasnet": (torchvision.models.mnasnet0_5, 1),
    "timm": (lambda: timm.create_model("mobilenetv2_050"), 1),
    "timm-same": (lambda: timm.create_model("tf_efficientnet_lite0"), 1),
    "ours": (lambda: mk.mobilenet_v2(0.35), 1),
    # Blocks with squeeze-excite among them: what is left to join stands between.
    "timm-v3": (lambda: timm.create_model("tf_mobilenetv3_small_minimal_100"), 1),
}


@pytest.mark.parametrize("size", [(64, 64), (65, 49)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks(calls, name, size):
    make, least = NETWORKS[name]
    original = ready(make())
    x = torch.randn(3, 3, *size)
    model = mk.fuse(original)
    assert_same(model(x), expect(original, x))
    assert len(calls) >= least


@torch.no_grad()
def test_one_call_for_stem_blocks_and_last_convolution(model, calls):
    model(torch.randn(2, 3, 64, 64))
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision(original, calls, dtype):
    x = torch.randn(2, 3, 64, 64).to(dtype)
    narrow = copy.deepcopy(original).to(dtype)
    expected = expect(narrow, x)
    of_layers = (narrow(x) - expected).abs().max()
    y = mk.fuse(narrow)(x)
    assert y.dtype == dtype and len(calls) == 1
    eps = torch.finfo(dtype).eps
    assert (y - expected).abs().max() <= 2 * of_layers + eps * expected.abs().max()


@torch.no_grad()
def test_sizes_layouts_and_batches(original, model, calls):
    for shape in ((1, 3, 64, 64), (5, 3, 33, 70), (2, 3, 64, 64), (0, 3, 64, 64)):
        x = torch.randn(shape)
        whole = expect(original, x)
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            y = model(laid_out)
            assert y.shape == whole.shape
            if len(x):
                assert_same(y, whole)
    assert len(calls) == 12


@torch.no_grad()
def test_parameters_as_they_are_at_each_call(original, model, calls):
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    changed = copy.deepcopy(original)
    for block in (0, 4, 18):  # A stem, a block, a 1x1 convolution.
        for part in (model, changed):
            next(part.features[block].parameters()).mul_(1.5)
        assert_same(model(x), expect(changed, x))
    model.features[7].conv[0][1].running_var.mul_(2)
    changed.features[7].conv[0][1].running_var.mul_(2)
    assert_same(model(x), expect(changed, x))
    model.load_state_dict(original.state_dict())
    assert torch.equal(model(x), before)
    assert len(calls) == 6


def hook(module: nn.Module, seen: list):
    return module.register_forward_hook(lambda module, args, y: seen.append(y))


@pytest.mark.parametrize(
    "where",
    [
        lambda m: m.features[0],
        lambda m: m.features[0][0],
        lambda m: m.features[5],
        lambda m: m.features[5].conv[1][0],
        lambda m: m.features[18][2],
    ],
    ids=["stem", "in the stem", "block", "in a block", "in the last convolution"],
)
@torch.no_grad()
def test_hooks_are_called(original, model, calls, where):
    x, seen = torch.randn(2, 3, 64, 64), []
    model(x)
    handle = hook(where(model), seen)
    assert_same(model(x), expect(original, x))
    calls.clear()  # The layers that nobody listens to may have run together.
    handle.remove()
    model(x)
    assert len(seen) == len(calls) == 1


@torch.no_grad()
def test_hooks_of_the_container_and_of_all_modules(original, model, calls):
    x, seen = torch.randn(2, 3, 64, 64), []
    handle = hook(model.features, seen)
    model(x)
    assert len(seen) == len(calls) == 1
    handle.remove()
    handle = hooks_of_all.register_module_forward_hook(lambda module, args, y: seen.append(y))
    try:
        model(x)
    finally:
        handle.remove()
    assert len(seen) > 20 and len(calls) == 1


@torch.no_grad()
def test_hooks_of_a_container_inside(calls):
    original = ready(timm.create_model("mobilenetv2_050"))
    model, seen = mk.fuse(original), []
    x = torch.randn(2, 3, 64, 64)
    hook(model.blocks[2], seen)
    assert_same(model(x), expect(original, x))
    assert len(seen) == 1


@torch.no_grad()
def test_forward_replaced(original, model, calls):
    x = torch.randn(2, 3, 64, 64)
    block = model.features[4]
    block.forward = lambda x: 2 * type(block).forward(block, x)
    y = model(x)
    assert not calls
    del block.forward
    assert not torch.allclose(y, model(x)) and len(calls) == 1


@torch.no_grad()
def test_children_replaced(original, model, calls):
    x = torch.randn(2, 3, 64, 64)
    model(x)
    other = ready(copy.deepcopy(original).features[5], 16, 8, 8)
    model.features[5] = other
    changed = copy.deepcopy(original)
    changed.features[5] = other
    assert_same(model(x), expect(changed, x))
    model.features[5] = mk.fuse(other)
    assert_same(model(x), expect(changed, x))
    del model.features[6], changed.features[6]
    assert_same(model(x), expect(changed, x))


def test_training_and_gradients_run_the_layers(original, model, calls):
    x = torch.randn(4, 3, 64, 64)
    model.train()
    model(x)
    model.eval()
    model(x)  # Parameters require gradients.
    model.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad is not None and not calls
    model(x)
    assert len(calls) == 1


@torch.no_grad()
def test_one_norm_in_training_mode(original, model, calls):
    x = torch.randn(4, 3, 64, 64)
    changed = copy.deepcopy(original)
    for part in (model, changed):
        part.features[18][1].train()
    assert_same(model(x), expect(changed, x), 1e-4)
    assert not calls


@torch.no_grad()
def test_an_asked_for_backend_and_autocast_run_the_layers(original, model, calls):
    x = torch.randn(2, 3, 64, 64)
    assert_same(mk.fuse(original, backend="reference")(x), expect(original, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert not calls
    mk.fuse(original, backend="cpu")(x)
    assert len(calls) == 1


@torch.no_grad()
def test_slices_copies_and_unfuse(original, model, calls):
    x = torch.randn(2, 3, 64, 64)
    features = expect(original.features, x)
    middle = expect(original.features[:9], x)
    assert_same(model.features[:9](x), middle)
    assert_same(model.features[9:](model.features[:9](x)), features)
    assert len(calls) == 3
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.features(x), model.features(x))
    y = x
    for child in model.features:
        y = child(y)
    assert_same(y, features)
    plain = mk.unfuse(model)
    assert not any(isinstance(m, FusedSequential) for m in plain.modules())
    assert torch.equal(plain(x), original(x))


@torch.no_grad()
def test_same_bits_in_any_batch_and_at_any_number_of_threads(model):
    x = torch.randn(5, 3, 64, 64)
    whole = model(x)
    assert all(
        torch.equal(model.features(x[i : i + 1]), model.features(x)[i : i + 1]) for i in range(5)
    )
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(model.features(x), model.features(x))
            found = model.features(x)
            assert torch.equal(
                found, model.features(x.contiguous(memory_format=torch.channels_last))
            )
            if count == 1:
                first = found
            assert torch.equal(found, first)
    finally:
        torch.set_num_threads(threads)
    assert whole.shape == (5, 10)


@torch.no_grad()
def test_images_that_do_not_fit(original, model):
    for x in (torch.randn(2, 4, 64, 64), torch.randn(3, 64), torch.randn(2, 3, 64, 64).double()):
        with pytest.raises(Exception) as expected:
            original.features(x)
        with pytest.raises(type(expected.value)):
            model.features(x)


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "one layer"])
@torch.no_grad()
def test_statistics_follow_batches_in_training_mode(original, model, calls, whole):
    """PyTorch does not count what batch norm does to its statistics."""
    x = torch.randn(8, 3, 64, 64)
    model(x)
    changed = copy.deepcopy(original)
    for part in (model, changed):
        of = part if whole else part.features[0]
        of.train()
        of(3 * x + 1)
        of.eval()
    assert_same(model(x), expect(changed, x))
    assert len(calls) == 2


@torch.no_grad()
def test_data_in_place_then_eval(original, model, calls):
    x = torch.randn(2, 3, 64, 64)
    changed = copy.deepcopy(original)
    for layer in (0, 4, 18):
        model(x)
        for part in (model, changed):
            next(part.features[layer].parameters()).data.mul_(1.5)
            part.eval()
        assert_same(model(x), expect(changed, x))
    assert len(calls) == 6


def _other_forward(conv: nn.Module) -> None:
    conv.forward = lambda x: 2 * type(conv).forward(conv, x)


LAYER_CHANGES = {
    "forward of a convolution": lambda m: _other_forward(m.features[0][0]),
    "bound of a clip": lambda m: setattr(m.features[0][2], "max_val", 0.5),
    "class of a clip": lambda m: setattr(m.features[18][2], "__class__", nn.SiLU),
    "forward inside a block": lambda m: _other_forward(m.features[5].conv[1][0]),
    "bound inside a block": lambda m: setattr(m.features[5].conv[0][2], "max_val", 0.5),
}


@pytest.mark.parametrize("change", LAYER_CHANGES.values(), ids=LAYER_CHANGES)
@torch.no_grad()
def test_layers_changed_in_place(original, model, calls, change):
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    changed = copy.deepcopy(original)
    for part in (model, changed):
        change(part)
    y = model(x)
    assert_same(y, changed(x).double())
    assert not torch.allclose(y, before)


@torch.no_grad()
def test_weights_are_held_once(model):
    """Programs of other sizes go with the weights that they were made of."""
    features = model.features
    for size in range(32, 64, 4):
        next(features[3].parameters()).mul_(1)
        features(torch.randn(1, 3, size, size))
    ((found, _),) = features._current_parts()
    assert len(found._known.programs) == 1
    for size in range(32, 160, 4):
        features(torch.randn(1, 3, size, 32))
    assert len(found._known.programs) == joined._MOST_PROGRAMS


@torch.no_grad()
def test_a_sequential_as_the_root_of_a_trace(original, calls):
    root = mk.fuse(nn.Sequential(*original.features[:4]))
    x = torch.randn(2, 3, 64, 64)
    assert isinstance(root, FusedSequential)
    assert_same(torch.fx.symbolic_trace(root)(x), expect(nn.Sequential(*original.features[:4]), x))


@torch.no_grad()
def test_a_stem_behind_a_block(calls):
    block = mk.InvertedResidual(3, 3)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    inside = nn.Sequential(block, stem, mk.InvertedResidual(8, 8), mk.InvertedResidual(8, 8))
    original = ready(nn.Sequential(inside, mk.InvertedResidual(8, 8)))
    x = torch.randn(2, 3, 40, 40)
    assert_same(mk.fuse(original)(x), expect(original, x))
    assert len(calls) == 1


def test_shared_containers_stay_shared(original):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Sequential(*original.features[2:5])

    fused = mk.fuse(Twice())
    assert fused.a is fused.b and isinstance(fused.a, FusedSequential)


def test_lazy_layers_are_left_alone():
    model = mk.fuse(nn.Sequential(nn.LazyConv2d(16, 1), mk.InvertedResidual(16, 16)).eval())
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 16, 8, 8)
