"""Whole networks run as one call, and only where that is what their own forward computes.

What they share with a Sequential of layers: test_together.py.
"""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from whole_networks import NETWORKS, WHOLE, assert_same, expect, ready

import mnv2_kernels as mk
from mnv2_kernels.ops.extension import missing

pytestmark = [
    pytest.mark.sampled(2),
    pytest.mark.skipif(missing is not None, reason=f"no compiled kernels: {missing}"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def original() -> nn.Module:
    original = ready(NETWORKS["timm"]())
    nn.init.normal_(original.classifier.bias)
    return original


@pytest.fixture
def model(original) -> nn.Module:
    return mk.fuse(original)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks(watch, name):
    original = ready(NETWORKS[name]())
    model = mk.fuse(original)
    assert isinstance(model, type(original)) and type(model).__name__ == type(original).__name__
    for shape in ((3, 3, 64, 64), (1, 3, 65, 49), (0, 3, 64, 64)):
        x = torch.randn(shape)
        y = watch(model, x)
        assert y.shape == original(x).shape and y.is_contiguous()
        assert watch.ran == WHOLE
        if len(x):
            assert_same(y, expect(original, x))


@pytest.mark.parametrize("classes", [1, 3, 1000])
@torch.no_grad()
def test_classifiers(watch, classes):
    """Of more images than are classified at once, with an odd rest."""
    original = ready(torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=classes))
    x = torch.randn(21, 3, 32, 32)
    assert_same(watch(mk.fuse(original), x), expect(original, x))
    assert watch.ran == WHOLE


@torch.no_grad()
def test_inside_another_model(original, watch, x):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = copy.deepcopy(original)

        def forward(self, x):
            print("called")
            return self.backbone(x) * 2

    around = Around().eval()
    fused = mk.fuse(around)
    assert type(fused) is Around
    assert_same(watch(fused, x), expect(around, x))
    assert watch.ran == WHOLE


@torch.no_grad()
@pytest.mark.parametrize("pool", ["", "max", "avgmax"])
def test_other_ends(watch, x, pool):
    """No average, or one of something else: what comes before it runs together."""
    original = ready(timm.create_model("mobilenetv2_050", num_classes=0, global_pool=pool))
    assert_same(watch(mk.fuse(original), x), expect(original, x))
    assert watch.ran.together == 1 and watch.ran.depthwise == 0


@torch.no_grad()
@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 1, "same"), (5, 2, 0)])
def test_other_beginnings(kernel, stride, padding, watch):
    """As for small images: no stem that the kernels have, but blocks that run together."""
    original = ready(NETWORKS["timm"]())
    original.conv_stem = nn.Conv2d(3, 16, kernel, stride, padding)
    x = torch.randn(2, 3, 40, 36)
    model = mk.fuse(original)
    for _ in range(3):
        assert_same(watch(model, x), expect(original, x))
        assert watch.ran.together == 1 and watch.ran.depthwise == 0


def test_effects_of_a_forward_are_not_lost(original):
    """One that does more than compute is called each time, though `fuse` has looked at it."""

    class Counts(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    fused = mk.fuse(Counts(copy.deepcopy(original)))
    assert fused.calls == 0
    fused(torch.randn(1, 3, 32, 32))
    assert fused.calls == 1


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(1280, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x)


@torch.no_grad()
def test_effects_of_a_module_inside_are_not_lost(original, watch, x):
    original = copy.deepcopy(original)
    original.classifier = Head()
    fused = mk.fuse(original)
    assert fused.classifier.calls == 0
    watch(fused, x)
    assert fused.classifier.calls == 1 and watch.ran.together >= 1


@torch.no_grad()
def test_a_method_replaced_before(original, x):
    original, seen = copy.deepcopy(original), []

    def forward_head(features, own=original.forward_head):
        print(len(features))
        seen.append(len(features))
        return own(features)

    original.forward_head = forward_head
    fused = mk.fuse(original)
    seen.clear()
    fused(x)
    assert seen == [2]


def _set(path: str, value) -> Callable[[nn.Module], None]:
    *owner, name = path.split(".")
    return lambda model: setattr(model.get_submodule(".".join(owner)), name, value)


def _patch(model: nn.Module) -> None:
    own = type(model).forward_features
    model.forward_features = MethodType(lambda self, x: 2 * own(self, x), model)


def _delete(model: nn.Module) -> None:
    del model.feature_info
    model.forward_head = lambda features: features.mean((2, 3))


def _scale(name: str) -> Callable[[nn.Module], None]:
    return lambda m: m.get_submodule(name).register_forward_hook(lambda m, args, y: 2 * y)


def _forward(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        part = model.get_submodule(name)
        part.forward = lambda x: 2 * type(part).forward(part, x)

    return change


def _new_hooks(model: nn.Module) -> None:
    model.classifier._forward_hooks = OrderedDict()
    _scale("classifier")(model)


def _grid(model: nn.Module) -> None:
    model.global_pool.pool.output_size = [1, 1]
    model.global_pool.pool.output_size[:] = [2, 2]
    model.classifier = nn.Identity()


def _parameter(path: str, change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    owner, _, name = path.rpartition(".")

    def changed(model: nn.Module) -> None:
        old = getattr(model.get_submodule(owner), name)
        setattr(model.get_submodule(owner), name, nn.Parameter(change(old.detach())))

    return changed


def _cut(model: nn.Module) -> None:
    model.classifier.weight.data = model.classifier.weight.data[:5]
    model.classifier.bias.data = model.classifier.bias.data[:5]


# What only the network's own forward follows. Each changes the result.
CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "a method": _patch,
    "a method and a deleted attribute": _delete,
    "another classifier": lambda m: m.reset_classifier(7),
    "no classifier": lambda m: m.reset_classifier(0),
    "class of the classifier": lambda m: m.classifier.__setattr__("__class__", Negative),
    "classifier cut": _cut,
    "new weight of the classifier": _parameter("classifier.weight", lambda t: 2 * t.mT.clone().mT),
    "a bias for all classes": _parameter("classifier.bias", lambda t: t[:1].expand(10)),
    "no bias": lambda m: setattr(m.classifier, "bias", None),
    "another stem": _set("conv_stem", nn.Conv2d(3, 16, 3, 2, 1)),
    "a larger stem": _parameter("conv_stem.weight", lambda t: torch.ones(16, 3, 5, 5)),
    "another norm": _set("bn2", nn.BatchNorm2d(1280).eval()),
    "another block": lambda m: m.blocks[1].__setitem__(1, nn.Identity()),
    "another pool": _set("global_pool", nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())),
    "kind of pool": _set("global_pool.pool", nn.AdaptiveMaxPool2d(1)),
    "grid of a pool": _grid,
    "forward of the classifier": _forward("classifier"),
    "forward of the pool": _forward("global_pool"),
    "hook on the classifier": _scale("classifier"),
    "hook in a new dictionary": _new_hooks,
    "hook on the pool": _scale("global_pool"),
    "hook on the blocks": _scale("blocks"),
    "hook on a stage": _scale("blocks.2"),
}


class Negative(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changes_of_the_model(original, model, x, change):
    before = model(x)
    changed = copy.deepcopy(original)
    for part in (model, changed):
        torch.manual_seed(1)
        change(part)
    for fused in (model, model, mk.fuse(model)):
        y = fused(x)
        assert_same(y, changed(x).double())
        assert y.shape != before.shape or not torch.allclose(y, before)


@pytest.mark.parametrize(
    "change", ["another classifier", "no classifier", "no bias", "another stem", "another block"]
)
@torch.no_grad()
def test_changes_that_can_be_read_run_as_one_call_again(model, watch, x, change):
    model(x)
    old = weakref.ref(model.conv_stem), weakref.ref(model.classifier)
    CHANGES[change](model)
    watch(model, x)
    assert watch.ran == WHOLE
    gc.collect()
    kept = [part() for part in old]
    assert all(part is None or part in model.modules() for part in kept)


@torch.no_grad()
def test_values_that_the_forward_branches_on(original, model, watch, x):
    """timm's dropout before the classifier looks at a number and at the mode."""
    for rate in (0.0, 0.5, 0.0):
        model.drop_rate = rate
        model(x)
        assert_same(watch(model, x), expect(original, x))
    assert watch.ran == WHOLE
    model.note = "a new attribute that is no method"
    watch(model, x)
    assert watch.ran == WHOLE
    for value in (torch.ones(2), torch.zeros(2)):
        model(x)  # For more changes in a row the layers run for a while.
        model.cache = (value, torch.ones(2))
        assert_same(watch(model, x), expect(original, x))
        assert watch.ran == WHOLE


@torch.no_grad()
def test_layers_of_two_dtypes(original, model, x):
    """They raise what they raise without `fuse`."""
    changed = copy.deepcopy(original)
    for part in (model, changed):
        part.classifier.bias = nn.Parameter(part.classifier.bias.double())
        with pytest.raises(RuntimeError, match="type"):
            part(x)
        part.classifier.double()
        with pytest.raises(RuntimeError, match="type"):
            part(x)


@torch.no_grad()
def test_parts_of_the_model(original, model, x):
    """Its other methods are its own."""
    features = model.forward_features(x)
    assert_same(features, copy.deepcopy(original).double().forward_features(x.double()))
    assert_same(model.forward_head(features), expect(original, x))
    assert_same(model.forward(x), expect(original, x))
    assert_same(model(x=x), expect(original, x))


@torch.no_grad()
def test_shallow_copies_are_models_of_their_own(original, model, x):
    model(x)
    other, changed = copy.copy(model), copy.deepcopy(original)
    other._modules = dict(other._modules)
    other.classifier = changed.classifier = nn.Linear(1280, 3)
    assert_same(other(x), changed(x).double())
    assert_same(model(x), expect(original, x))


class Derived(type(mk.fuse(timm.create_model("mobilenetv2_050")))):
    pass


@torch.no_grad()
def test_classes_derived_from_that_of_a_whole_network(model, x):
    y = model(x)
    model.__class__ = Derived
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), mk.fuse(model)):
        assert type(other) is Derived
        assert torch.allclose(other(x), y, rtol=1e-4, atol=1e-4)
    assert torch.allclose(mk.unfuse(model)(x), y, rtol=1e-4, atol=1e-4)
    kind = type(mk.fuse(torchvision.models.mobilenet_v2()))
    assert type(mk.unfuse(kind(num_classes=5))) is torchvision.models.MobileNetV2


@torch.no_grad()
def test_modes_and_subclasses_that_see_functions(original, model, x, watch):
    linear = nn.functional.linear

    class Zeros(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            return torch.zeros_like(y) if function.__name__ == "linear" else y

    class Negative(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            y = super().__torch_function__(function, types, args, kwargs or {})
            return -y if function.__name__ == "linear" else y

    with Zeros():
        assert not watch(model, x).any()
    assert watch.ran.together == 0 and nn.functional.linear is linear
    with torch.device("cpu"):
        watch(model, x)
    assert watch.ran == WHOLE
    weight = model.classifier.weight.detach().clone()
    model.classifier.weight = nn.Parameter(weight.as_subclass(Negative), requires_grad=False)
    assert_same(model(x).as_subclass(torch.Tensor), -expect(original, x))


@torch.no_grad()
def test_frozen_norms(original, model, x, watch):
    model(x)
    mk.freeze_bn(model, inplace=True)
    assert_same(watch(model, x), expect(original, x))
    assert watch.ran == WHOLE
    frozen = mk.freeze_bn(model)
    frozen.bn1.momentum = 0.5
    assert_same(watch(frozen, x), expect(original, x))
    assert watch.ran == WHOLE


@torch.no_grad()
def test_folding_of_layers_by_others_is_seen(model, x, watch):
    """A norm folded into the stem from outside: the layers are no longer those that were read."""
    before = model(x)
    model.conv_stem = torch.nn.utils.fuse_conv_bn_eval(model.conv_stem, model.bn1)
    model.bn1 = copy.deepcopy(model.bn1.act)
    assert_same(watch(model, x), before.double())
    assert watch.ran == WHOLE
