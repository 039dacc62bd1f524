"""Whole networks run as one call, and only where that is what their own forward computes."""

import copy
import io
import pickle
from collections.abc import Callable
from types import MethodType

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import assert_same, count_calls, expect, ready

import mnv2_kernels as mk
from mnv2_kernels.fuse.model import WholeNetwork
from mnv2_kernels.ops.extension import missing

pytestmark = [
    pytest.mark.skipif(missing is not None, reason=f"no compiled kernels: {missing}"),
    pytest.mark.usefixtures("settled"),
]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=10),
    "mnasnet": lambda: torchvision.models.mnasnet0_5(num_classes=10),
    "timm": lambda: timm.create_model("mobilenetv2_050", num_classes=10),
    "timm-same": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10),
    "timm-v1": lambda: timm.create_model("mobilenetv1_100", num_classes=10),
    "timm-headless": lambda: timm.create_model("mobilenetv2_050", num_classes=0),
    "ours": lambda: mk.mobilenet_v2(0.35, num_classes=10),
}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    return count_calls(monkeypatch)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return ready(NETWORKS["timm"]())


@pytest.fixture
def model(original) -> nn.Module:
    return mk.fuse(original)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks(calls, name):
    original = ready(NETWORKS[name]())
    model = mk.fuse(original)
    assert isinstance(model, type(original)) and type(model).__name__ == type(original).__name__
    for shape in ((3, 3, 64, 64), (1, 3, 65, 49), (0, 3, 64, 64)):
        x = torch.randn(shape)
        y = model(x)
        assert y.shape == original(x).shape and y.is_contiguous()
        if len(x):
            assert_same(y, expect(original, x))
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision(original, calls, dtype):
    x = torch.randn(2, 3, 64, 64).to(dtype)
    narrow = copy.deepcopy(original).to(dtype)
    expected = expect(narrow, x)
    of_layers = (narrow(x) - expected).abs().max()
    y = mk.fuse(narrow)(x)
    assert y.dtype == dtype and calls == [2]
    eps = torch.finfo(dtype).eps
    assert (y - expected).abs().max() <= 2 * of_layers + eps * expected.abs().max()


@torch.no_grad()
def test_inside_another_model(original, calls, x):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = copy.deepcopy(original)

        def forward(self, x):
            print("called")
            return self.backbone(x) * 2

    around = Around().eval()
    fused = mk.fuse(around)
    assert type(fused) is Around and isinstance(fused.backbone, WholeNetwork)
    assert_same(fused(x), expect(around, x))
    assert calls == [2]


def test_a_forward_that_is_not_known_is_not_run_by_fuse(original):
    class Counts(nn.Sequential):
        calls = 0

        def forward(self, x):
            Counts.calls += 1
            return super().forward(x)

    fused = mk.fuse(Counts(copy.deepcopy(original)))
    assert Counts.calls == 0
    fused(torch.randn(1, 3, 32, 32))
    assert Counts.calls == 1


def _set(path: str, value) -> Callable[[nn.Module], None]:
    *owner, name = path.split(".")
    return lambda model: setattr(model.get_submodule(".".join(owner)), name, value)


def _patch(model: nn.Module) -> None:
    own = type(model).forward_features
    model.forward_features = MethodType(lambda self, x: 2 * own(self, x), model)


def _scale(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(name).register_forward_hook(lambda m, args, y: 2 * y)

    return change


def _forward(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        part = model.get_submodule(name)
        part.forward = lambda x: 2 * type(part).forward(part, x)

    return change


# What only the network's own forward follows. Each changes the result.
CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "a method": _patch,
    "another classifier": lambda m: m.reset_classifier(7),
    "no classifier": lambda m: m.reset_classifier(0),
    "another stem": _set("conv_stem", nn.Conv2d(3, 16, 3, 2, 1)),
    "another norm": _set("bn2", nn.BatchNorm2d(1280).eval()),
    "another block": lambda m: m.blocks[1].__setitem__(1, nn.Identity()),
    "another pool": _set("global_pool", nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())),
    "kind of pool": _set("global_pool.pool", nn.AdaptiveMaxPool2d(1)),
    "class of the classifier": lambda m: m.classifier.__setattr__("__class__", Negative),
    "stride of the stem": _set("conv_stem.stride", (1, 1)),
    "forward of the stem": _forward("conv_stem"),
    "forward of the classifier": _forward("classifier"),
    "forward of the pool": _forward("global_pool"),
    "hook on the stem": _scale("conv_stem"),
    "hook on the classifier": _scale("classifier"),
    "hook on the pool": _scale("global_pool"),
    "hook on the blocks": _scale("blocks"),
    "hook on a stage": _scale("blocks.2"),
    "hook on the model": _scale(""),
    "hook in a block": _scale("blocks.2.0.conv_dw"),
    "parametrization": lambda m: nn.utils.parametrize.register_parametrization(
        m.classifier, "weight", Doubled()
    ),
}


class Negative(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("first", [True, False], ids=["called before", "not called"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changes_of_the_model(original, model, x, change, first):
    before = model(x) if first else mk.fuse(original)(x)
    changed = copy.deepcopy(original)
    for part in (model, changed):
        torch.manual_seed(1)
        change(part)
    y = model(x)
    assert_same(y, changed(x).double())
    assert y.shape != before.shape or not torch.allclose(y, before)


@torch.no_grad()
def test_values_that_the_forward_branches_on(calls, x):
    """timm's dropout before the classifier looks at a number and at the mode."""
    model = mk.fuse(ready(NETWORKS["timm"]()))
    y = model(x)
    model.drop_rate = 0.5
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    assert calls[0] == 2 and 2 not in calls[1:]
    model.drop_rate = 0.0
    model(x)
    assert calls[-1] == 2
    model.note = "a new attribute that is no method"
    model(x)
    assert calls[-2:] == [2, 2]


@torch.no_grad()
def test_parameters_as_they_are(original, model, calls, x):
    before = model(x)
    changed = copy.deepcopy(original)
    names = ["conv_stem.weight", "bn1.bias", "bn2.running_var", "conv_head.weight"]
    for name in [*names, "classifier.weight", "classifier.bias", "blocks.1.0.conv_pw.weight"]:
        for part in (model, changed):
            part.state_dict(keep_vars=True)[name].mul_(1.5)
        assert_same(model(x), expect(changed, x))
    for part in (model, changed):
        part.classifier.weight = nn.Parameter(torch.randn_like(part.classifier.weight))
        part.classifier.bias = None
    changed.classifier.weight = model.classifier.weight
    assert_same(model(x), expect(changed, x))
    model.classifier.bias = nn.Parameter(torch.zeros(10))
    model.load_state_dict(original.state_dict())
    assert torch.equal(model(x), before)
    assert calls == [2] * (3 + len(names) + 3)


@torch.no_grad()
def test_data_in_place_then_eval(original, model, x):
    changed = copy.deepcopy(original)
    for name in ("conv_stem", "conv_head", "classifier", "blocks.1.0.conv_pw"):
        model(x)
        for part in (model, changed):
            part.get_submodule(name).weight.data.mul_(1.5)
            part.eval()
        assert_same(model(x), expect(changed, x))


def test_training_gradients_and_modes(original, model, calls, x):
    model(x)  # Parameters require gradients.
    model.train()(x)
    assert not calls
    model.eval()
    model.load_state_dict(original.state_dict())
    with torch.no_grad():
        assert_same(model(x), expect(original, x))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    assert calls == [2]
    loss, expected = model(x).sum(), original(x).sum()
    for of, part in ((loss, model), (expected, original)):
        of.backward()
        assert part.conv_stem.weight.grad is not None
    assert_same(model.conv_stem.weight.grad, original.conv_stem.weight.grad.double(), 1e-3)
    original.zero_grad()
    assert calls == [2]


@torch.no_grad()
def test_a_part_in_training_mode(original, model, calls, x):
    changed = copy.deepcopy(original)
    for part in (model, changed):
        part.bn2.train()
    assert_same(model(x), changed(x).double())
    assert 2 not in calls


@torch.no_grad()
def test_fused_in_training_mode(original, calls, x):
    model = mk.fuse(copy.deepcopy(original).train())
    assert model.training and model.bn1.training and model.blocks.training
    model.eval()
    assert_same(model(x), expect(original, x))
    assert calls == [2]


@torch.no_grad()
def test_copies_pickles_and_unfuse(original, model, calls, x):
    y = model(x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
        mk.fuse(model),
    )
    for other in copies:
        calls.clear()
        assert torch.equal(other(x), y) and calls == [2]
        other.classifier.weight.zero_()
        other.conv_stem.weight.zero_()
        assert not torch.equal(other(x), y)
        assert torch.equal(model(x), y)
    plain = mk.unfuse(model)
    assert type(plain) is type(original) and vars(plain).keys() == vars(original).keys()
    assert torch.equal(plain(x), original(x))
    assert isinstance(model, WholeNetwork)
    assert model.state_dict().keys() == original.state_dict().keys()


@torch.no_grad()
def test_parts_of_the_model(original, model, x):
    """Its other methods are its own."""
    features = model.forward_features(x)
    assert_same(features, copy.deepcopy(original).double().forward_features(x.double()))
    assert_same(model.forward_head(features), expect(original, x))
    assert_same(model.forward(x), expect(original, x))
    assert_same(model(x=x), expect(original, x))


@torch.no_grad()
def test_tracing_and_compiling(original, model, x):
    expected = expect(original, x)
    assert_same(torch.fx.symbolic_trace(model)(x), expected)
    assert_same(torch.jit.trace(model, x)(x), expected)
    assert_same(torch.export.export(model, (x,)).module()(x), expected)
    assert_same(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    parameters = dict(copy.deepcopy(model).named_parameters())
    parameters["classifier.weight"] = 2 * parameters["classifier.weight"]
    changed = copy.deepcopy(original)
    changed.classifier.weight.mul_(2)
    assert_same(torch.func.functional_call(model, parameters, (x,)), expect(changed, x))
    assert_same(model(x), expected)


@torch.no_grad()
def test_same_bits_in_any_batch_and_at_any_number_of_threads(model):
    x = torch.randn(19, 3, 64, 64)
    one_by_one = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for batch in (2, 9, 19):
                assert torch.equal(model(x[:batch]), one_by_one[:batch])
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_what_does_not_fit(original, model):
    for x in (torch.randn(2, 4, 64, 64), torch.randn(3, 64), torch.randn(2, 3, 64, 64).double()):
        with pytest.raises(Exception) as expected:
            original(x)
        with pytest.raises(type(expected.value)):
            model(x)
    mixed = copy.deepcopy(model)
    mixed.classifier.double()
    with pytest.raises(RuntimeError, match="dtype"):
        mixed(torch.randn(1, 3, 32, 32))


@torch.no_grad()
def test_other_ends(calls):
    """No average, or one that is not flattened: the blocks alone run together."""

    def headless(pool: str) -> nn.Module:
        return ready(timm.create_model("mobilenetv2_050", num_classes=0, global_pool=pool))

    x = torch.randn(2, 3, 64, 64)
    for pool in ("", "max", "avgmax"):
        original = headless(pool)
        calls.clear()
        assert_same(mk.fuse(original)(x), expect(original, x))
        assert calls and set(calls) == {4}


@torch.no_grad()
@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 1, "same"), (5, 2, 0)])
def test_other_beginnings(kernel, stride, padding, calls):
    """As for small images: no stem that the kernels have, but blocks that run together."""
    original = ready(timm.create_model("mobilenetv2_050", num_classes=10))
    original.conv_stem = nn.Conv2d(3, 16, kernel, stride, padding)
    x = torch.randn(2, 3, 40, 36)
    model = mk.fuse(original)
    for _ in range(3):
        assert_same(model(x), expect(original, x))
    assert calls and set(calls) == {4}


@torch.no_grad()
def test_an_asked_for_backend(original, calls, x):
    assert_same(mk.fuse(original, backend="reference")(x), expect(original, x))
    assert not calls
    mk.fuse(original, backend="cpu")(x)
    assert calls == [2]


@torch.no_grad()
def test_folding_of_layers_by_others_is_seen(original, model, x):
    """A norm folded into the stem from outside: the layers are no longer those that were read."""
    before = model(x)
    model.conv_stem = torch.nn.utils.fuse_conv_bn_eval(model.conv_stem, model.bn1)
    model.bn1 = copy.deepcopy(model.bn1.act)
    assert_same(model(x), before.double())


@torch.no_grad()
def test_the_classifier_of_many_images(x):
    """More than are classified at once, an odd rest, another number of classes."""
    for classes in (1, 3, 1000):
        original = ready(torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=classes))
        many = torch.randn(21, 3, 32, 32)
        model = mk.fuse(original)
        assert_same(model(many), expect(original, many))
        assert_same(F.softmax(model(many), 1), F.softmax(expect(original, many), 1))
