"""What a whole network takes for granted, and how it sees that it no longer is so."""

import copy
import gc
import pickle
import threading
import weakref
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from whole_networks import assert_same, count_calls, expect, ready

import mnv2_kernels as mk
from mnv2_kernels.fuse.model import WholeNetwork
from mnv2_kernels.ops.extension import missing

pytestmark = [
    pytest.mark.skipif(missing is not None, reason=f"no compiled kernels: {missing}"),
    pytest.mark.usefixtures("one_thread", "settled"),
]


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return ready(timm.create_model("mobilenetv2_050", num_classes=10))


@pytest.fixture
def model(original) -> nn.Module:
    return mk.fuse(original)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    return count_calls(monkeypatch)


def test_other_threads_go_on_while_a_model_is_read(original):
    """torch.fx puts itself between all modules of the process and their calls."""
    served = ready(timm.create_model("mobilenetv2_050", num_classes=3))
    image = torch.randn(1, 3, 32, 32)
    expected, failures, done = served(image), [], threading.Event()

    def serve():
        while not done.is_set():
            try:
                if not torch.equal(served(image), expected):
                    failures.append("another result")
            except Exception as error:
                failures.append(repr(error))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(3):
            mk.fuse(original)
            mk.plan(original, (3, 64, 64))
    finally:
        done.set()
        thread.join()
    assert not failures


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(1280, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x)


@torch.no_grad()
def test_modules_of_somebody_else_are_called_and_not_traced(original, x):
    original = copy.deepcopy(original)
    original.classifier = Head()
    fused = mk.fuse(original)
    assert fused.classifier.calls == 0 and not isinstance(fused, WholeNetwork)
    fused(x)
    assert fused.classifier.calls == 1


@torch.no_grad()
def test_a_method_replaced_before(original, x, calls):
    original, seen = copy.deepcopy(original), []

    def forward_head(features, own=original.forward_head):
        seen.append(len(features))
        return own(features)

    original.forward_head = forward_head
    fused = mk.fuse(original)
    assert not seen
    fused(x)
    assert seen == [2] and 2 not in calls


@torch.no_grad()
def test_a_method_replaced_and_an_attribute_deleted(model, original, x):
    model(x)
    changed = copy.deepcopy(original)
    for part in (model, changed):
        del part.feature_info
        part.forward_head = lambda features: features.mean((2, 3))
    assert_same(model(x), changed(x).double())


@torch.no_grad()
def test_lists_that_are_changed(original, x, calls):
    for size in ([1, 1], 1):
        changed = copy.deepcopy(original)
        changed.global_pool.pool.output_size = size
        fused = mk.fuse(changed)
        fused(x)
        for part in (fused, changed):
            part.global_pool.pool.output_size = [1, 1]
            part.global_pool.pool.output_size[:] = [2, 2]
            part.classifier = nn.Identity()
        assert_same(fused(x), changed(x).double())


@torch.no_grad()
def test_tensors_among_the_attributes(original, x, calls):
    original = copy.deepcopy(original)
    original.cache = (torch.ones(2), torch.ones(2))
    fused = mk.fuse(original)
    fused(x)
    fused.cache = (torch.zeros(2), torch.ones(2))
    assert_same(fused(x), expect(original, x))
    assert calls == [2, 2]


@torch.no_grad()
def test_weights_of_another_shape(original, x):
    def cut(model):
        model.classifier.weight.data = model.classifier.weight.data[:5]
        model.classifier.bias.data = model.classifier.bias.data[:5]

    def seven(model):
        model.classifier.weight = nn.Parameter(torch.ones(7, 1280))
        model.classifier.bias = nn.Parameter(torch.ones(7))

    def wider_stem(model):
        model.conv_stem.weight = nn.Parameter(torch.ones(16, 3, 5, 5))

    def one_bias(model):
        model.classifier.bias = nn.Parameter(torch.ones(1).expand(10))

    def transposed(model):
        model.classifier.weight = nn.Parameter(model.classifier.weight.t().contiguous().t())

    for change in (cut, seven, wider_stem, one_bias, transposed):
        fused, changed = mk.fuse(original), copy.deepcopy(original)
        fused(x)
        for part in (fused, changed):
            change(part)
        assert_same(fused(x), changed(x).double())


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


@torch.no_grad()
def test_fused_again(model, x, calls):
    model(x)
    old = weakref.ref(model.classifier)
    model.reset_classifier(7)
    model(x)
    gc.collect()
    assert old() is None and calls[0] == 2 and 2 not in calls[1:]
    fused = mk.fuse(model)
    assert torch.allclose(fused(x), model(x), rtol=1e-4, atol=1e-4) and calls[-2] == 2
    kind = type(mk.fuse(torchvision.models.mobilenet_v2()))
    assert type(mk.unfuse(kind(num_classes=5))) is torchvision.models.MobileNetV2


@torch.no_grad()
def test_modes_and_subclasses_that_see_functions(original, model, x, calls):
    class Zeros(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            return torch.zeros_like(y) if function is nn.functional.linear else y

    class Negative(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            y = super().__torch_function__(function, types, args, kwargs or {})
            return -y if function is nn.functional.linear else y

    with Zeros():
        assert not model(x).any()
    assert 2 not in calls
    with torch.device("cpu"):
        model(x)
    assert calls[-1] == 2
    weight = model.classifier.weight.detach().clone()
    model.classifier.weight = nn.Parameter(weight.as_subclass(Negative), requires_grad=False)
    bias = model.classifier.bias
    assert_same(model(x).as_subclass(torch.Tensor) - bias, bias - expect(original, x) - 0 * bias)


@torch.no_grad()
def test_hooks_in_a_new_dictionary(model, x):
    model(x)
    seen = []
    model.classifier._forward_hooks = OrderedDict()
    model.classifier.register_forward_hook(lambda *args: seen.append(args))
    model(x)
    assert len(seen) == 1


@torch.no_grad()
def test_frozen_norms(original, model, x, calls):
    model(x)
    mk.freeze_bn(model, inplace=True)
    assert_same(model(x), expect(original, x))
    frozen = mk.freeze_bn(model)
    frozen.bn1.momentum = 0.5
    assert_same(frozen(x), expect(original, x))
    assert calls[:2] == [2, 2]


@torch.no_grad()
def test_a_bias_of_another_dtype(original, model, x):
    changed = copy.deepcopy(original)
    for part in (model, changed):
        part.classifier.bias = nn.Parameter(part.classifier.bias.double())
        with pytest.raises(RuntimeError, match="type"):
            part(x)
