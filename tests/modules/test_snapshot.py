"""One look at modules: whatever changes is seen, and nothing is kept alive that should not be."""

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import timm
import torch
import torchvision
from mnv2_kernels.modules.snapshot import Snapshot
from random_networks import BLOCKS, CHAINS, Network, Piece, build, settle
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

import mnv2_kernels as mk
from mnv2_kernels.fuse import live_network as joined
from mnv2_kernels.fuse.sequential import FusedChain
from mnv2_kernels.modules import snapshot
from mnv2_kernels.modules.fused_module import FusedModule
from mnv2_kernels.ops.extension import missing
from mnv2_kernels.profiling.variants import plain

pytestmark = pytest.mark.skipif(missing is not None, reason=f"no compiled kernels: {missing}")


class Settings(NamedTuple):
    sizes: list[int]


class Layer(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.sizes, self.named, self.scale = [1, 2], {"a": 1}, torch.ones(2)
        self.nested, self.settings = [[1], (2, [3])], Settings([4])


class Other(Layer):
    pass


def attribute(name: str, value) -> Callable[[Layer], None]:
    return lambda layer: setattr(layer, name, value)


def into(place: str, key: str, value) -> Callable[[Layer], None]:
    return lambda layer: getattr(layer, place).__setitem__(key, value)


def data(change: Callable[[Tensor], Tensor]) -> Callable[[Layer], None]:
    def changed(layer: Layer) -> None:
        layer.weight.data = change(layer.weight.data)

    return changed


@torch.no_grad()
def in_place(layer: Layer) -> None:
    layer.weight.mul_(2)


@torch.no_grad()
def smaller(layer: Layer) -> None:
    layer.norm.running_var.resize_(2)


def reordered(layer: Layer) -> None:
    layer.bias, weight = nn.Parameter(torch.ones(4)), layer.weight
    del layer.weight
    layer.weight = weight


def renamed(layer: Layer) -> None:
    norm = layer.norm
    del layer.norm
    layer.other = norm


CHANGES = {
    "attribute": attribute("stride", (2, 2)),
    "equal attribute of another identity": attribute("padding", tuple([0, 0][:])),
    "new attribute": attribute("forward", lambda x: x),
    "deleted attribute": lambda layer: delattr(layer, "named"),
    "training": lambda layer: layer.train(),
    "item of a list": lambda layer: layer.sizes.__setitem__(0, 3),
    "longer list": lambda layer: layer.sizes.append(3),
    "list in a list": lambda layer: layer.nested[0].append(2),
    "list in a tuple in a list": lambda layer: layer.nested[1][1].append(2),
    "list in a named tuple": lambda layer: layer.settings.sizes.append(2),
    "dictionary of the object": lambda layer: setattr(layer, "__dict__", {**vars(layer)}),
    "class": attribute("__class__", Other),
    "child": attribute("norm", nn.BatchNorm2d(4)),
    "new child": attribute("further", nn.Identity()),
    "child renamed": renamed,
    "attribute of a child": lambda layer: setattr(layer.norm, "eps", 0.5),
    "parameter": attribute("weight", nn.Parameter(torch.ones(4, 3, 3, 3))),
    "no parameter": attribute("bias", None),
    "order of parameters": reordered,
    "parameter in place": in_place,
    "size in place": smaller,
    "other data": data(torch.clone),
    "part of the data": data(lambda t: t[:2]),
    "the same data in another layout": data(lambda t: t.transpose(2, 3)),
    "the same data as another type": data(
        lambda t: t.view(torch.float16).view(t.shape[0], 3, 3, -1)
    ),
    "freed memory": lambda layer: layer.weight.untyped_storage().resize_(0),
    "gradients": lambda layer: layer.weight.requires_grad_(False),
    "buffer in place": lambda layer: layer.norm.running_mean.add_(1),
    "tensor among the attributes": lambda layer: layer.scale.add_(1),
    "hook": lambda layer: layer.register_forward_hook(print),
    "hook before": lambda layer: layer.norm.register_forward_pre_hook(print),
    "hook of gradients": lambda layer: layer.register_full_backward_hook(print),
    "hooks in a new dictionary": attribute("_forward_hooks", OrderedDict(a=print)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name):
    layer = Layer().eval()
    taken = Snapshot(layer.modules())
    assert taken.holds() and taken.holds()
    kept = layer.weight.detach()  # Nothing new gets its address.
    CHANGES[name](layer)
    assert not taken.holds()
    assert kept.dim() == 4


def test_steps_of_optimizers():
    """Fused ones change parameters without a trace in these."""
    layer = Layer()
    taken = Snapshot([layer])
    torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()
    assert not taken.holds()


def test_the_least_differences():
    """Every tensor and attribute of many modules, one at a time; back again is no return."""
    model = nn.ModuleList(Layer().eval() for _ in range(40))
    taken = Snapshot(model.modules())
    for layer in model:
        before = layer.scale
        layer.scale = torch.ones(2)
        assert not taken.holds()
        layer.scale = before
        assert not taken.holds()
        taken = Snapshot(model.modules())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
            assert not taken.holds()
            taken = Snapshot(model.modules())
            assert taken.holds()


class Ordered(dict):
    pass


class Computed(nn.BatchNorm2d):
    eps = property(lambda self: 0.5, lambda self, value: None)


def add_itself(layer: Layer) -> None:
    layer.sizes.append(layer.sizes)


CANNOT_BE_SEEN = {
    "a list in itself": add_itself,
    "a long list": attribute("sizes", [0] * 5000),
    "a nested tensor": attribute("scale", torch.nested.nested_tensor([torch.ones(2)])),
    "a scripted child": lambda layer: setattr(layer, "child", torch.jit.script(nn.Linear(2, 2))),
    "an attribute that the class computes": attribute("norm", Computed(4)),
    "a sparse tensor": attribute("scale", torch.ones(2, 2).to_sparse()),
    "parameters in a subclass of dict": attribute("_parameters", Ordered(weight=None)),
}


@pytest.mark.parametrize("name", CANNOT_BE_SEEN)
def test_what_cannot_be_seen_never_holds(name):
    layer = Layer()
    CANNOT_BE_SEEN[name](layer)
    assert not Snapshot(layer.modules()).holds()


class Counting(list):
    def __getitem__(self, index):
        raise IndexError("not to be called")


def dead() -> object:
    return weakref.proxy(Layer())


STRANGE = {
    "a reference to a tensor": lambda layer: weakref.proxy(layer.weight),
    "a reference to what is gone": lambda layer: dead(),
    "what says it is a tensor": lambda layer: Mock(spec=Tensor),
    "a list of its own kind": lambda layer: Counting([1, 2]),
    "a list of references": lambda layer: [weakref.proxy(layer.weight), dead()],
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_attributes_are_only_looked_at(name):
    layer = Layer()
    vars(layer)["strange"] = STRANGE[name](layer)  # nn.Module asks what it is.
    taken = Snapshot(layer.modules())
    assert taken.holds()
    layer.strange = None
    assert not taken.holds()


def test_inference_tensors():
    with torch.inference_mode():
        layer = Layer()
    taken = Snapshot(layer.modules())
    assert taken.holds()
    layer.bias = None
    assert not taken.holds()


def chain() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(mk.InvertedResidual(8, 8) for _ in range(3))).eval()


@pytest.fixture
def looks(monkeypatch) -> list[joined.Joined]:
    """Whoever has looked closer."""
    seen = []

    def look(self, own=joined.Joined._look):
        seen.append(self)
        return own(self)

    monkeypatch.setattr(joined.Joined, "_look", look)
    return seen


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [
        torchvision.models.mobilenet_v2,
        torchvision.models.mnasnet0_5,
        lambda: timm.create_model("mobilenetv2_050"),
        lambda: timm.create_model("tf_efficientnet_lite0"),
    ],
)
def test_networks_look_closer_twice(build, looks, one_thread):
    model = mk.fuse(build().eval())
    for _ in range(6):
        model(torch.randn(1, 3, 32, 32))
    assert len(looks) == 2


@torch.no_grad()
def test_a_chain_looks_closer_only_after_changes(looks, one_thread):
    model, x = mk.fuse(chain()), torch.randn(1, 8, 9, 7)
    for _ in range(12):
        model(x)
    assert len(looks) == 2
    for size in (5, 6):
        model(torch.randn(2, 8, size, size))
    assert len(looks) == 2
    changed = copy.deepcopy(chain())
    for part in (model, changed):
        next(part.parameters()).mul_(1.5)
    for _ in range(4):
        torch.testing.assert_close(model(x), changed(x), rtol=1e-4, atol=1e-4)
    assert len(looks) == 4


@torch.no_grad()
def test_a_block_looks_closer_only_after_changes(monkeypatch, one_thread):
    looks = []

    def look(self, own=FusedModule._look):
        looks.append(self)
        return own(self)

    monkeypatch.setattr(FusedModule, "_look", look)
    original, x = InvertedResidual(8, 8, 1, 6).eval(), torch.randn(1, 8, 9, 7)
    model = mk.fuse(original)
    for _ in range(12):
        model(x)
    assert len(looks) == 2
    for part in (model, original):
        part.conv[1][1].running_var.mul_(4)
    for _ in range(4):
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)
    assert len(looks) == 4
    shallow = copy.copy(model)
    shallow(x)
    assert len(looks) == 5, "a copy of the module is another module"


@torch.no_grad()
@pytest.mark.parametrize("build_model", [lambda: chain()[0], chain], ids=["block", "chain"])
def test_models_that_change_all_the_time_take_few_snapshots(build_model, monkeypatch, one_thread):
    taken = []
    monkeypatch.setattr(snapshot, "Snapshot", lambda m: taken.append(1) or Snapshot(m))
    model, x = mk.fuse(build_model()), torch.randn(1, 8, 9, 7)
    part = next(m for m in model.modules() if isinstance(m, FusedModule))
    for number in range(300):
        part.number = number
        model(x)
    assert len(taken) <= 8
    for _ in range(300):
        model(x)
    assert len(taken) <= 9


@torch.no_grad()
def test_weights_and_back_again(one_thread):
    """The memory of the first weights has others by then."""
    original, x = chain(), torch.randn(1, 8, 9, 7)
    model = mk.fuse(original)
    weights = [part.conv[0][0].weight for part in (model[0], original[0])]
    first, second = weights[0].data.clone(), weights[0].data.flip(0)
    for data, calls in ((first, 12), (second, 1), (first, 3)):
        for weight in weights:
            weight.data = data
        for _ in range(calls):
            torch.testing.assert_close(model(x), plain(original)(x), rtol=1e-4, atol=1e-4)
        if data is second:
            first.mul_(1.5)


@torch.no_grad()
def test_what_was_dropped_is_not_kept(one_thread):
    model, x = mk.fuse(chain()[0]), torch.randn(1, 8, 9, 7)
    model.note = torch.ones(3)
    for _ in range(3):
        model(x)
    gone = weakref.ref(model.note), weakref.ref(model._folded)
    model.note = None
    model.train()
    gc.collect()
    assert not any(thing() is not None for thing in gone)


@pytest.mark.parametrize("kind", [*BLOCKS, *CHAINS])
def test_blocks_rest_on_nothing_else_than_their_modules(kind):
    piece = Piece(kind, 4)
    model = mk.fuse(settle(build(Network(1, 4, (piece,))), torch.randn(4, 4, 7, 6)))
    found = [m for m in model.modules() if isinstance(m, FusedModule)]
    found += [run.block for m in model.modules() if isinstance(m, FusedChain) for run in m.runs]
    for block in found:
        watched = block._watched
        rested_on = {*watched.norms, *watched.fixed, *watched.drops}
        assert rested_on | {module for *_, module in watched.places} <= {*block.modules()}


@pytest.mark.parametrize("build_model", [lambda: chain()[0], chain], ids=["block", "chain"])
def test_gradients_wanted_now_and_then(build_model, one_thread):
    model, x = mk.fuse(build_model()), torch.randn(1, 8, 9, 7)
    for _ in range(3):
        with torch.no_grad():
            assert not model(x).requires_grad
    assert model(x).requires_grad
    with torch.inference_mode():
        assert not model(x).requires_grad


@torch.no_grad()
@pytest.mark.parametrize("build_model", [lambda: chain()[0], chain], ids=["block", "chain"])
def test_models_that_were_called_are_collected(build_model, one_thread):
    model = mk.fuse(build_model())
    for _ in range(4):
        model(torch.randn(1, 8, 9, 7))
    gone = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert not any(module() for module in gone)
