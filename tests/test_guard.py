"""Guards of modules, compiled and in Python: every change is seen, and told by its kind."""

import copy
import gc
import itertools
import multiprocessing
import operator
import pickle
import random
import resource
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune

from mnv2_kernels.modules.guard import Change, Guard, optimizer_steps
from mnv2_kernels.ops import extension

SAME, WEIGHTS, STRUCTURE = Change


@pytest.fixture(params=["compiled", "twin"], autouse=True)
def kind(request, monkeypatch):
    """Every test is one of the guard in C++ and one of its twin in Python."""
    if request.param == "twin":
        monkeypatch.setattr(extension, "module", None)
    elif extension.module is None:
        pytest.skip(f"no compiled extension: {extension.missing}")
    return request.param


class Settings(NamedTuple):
    sizes: list[int]


class Layer(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.sizes, self.named, self.scale = [1, 2], {"a": 1}, torch.ones(2)
        self.nested, self.settings = [[1], (2, [3])], Settings([4])
        self.scales = [torch.ones(3)]

    def __getattr__(self, name):
        return super().__getattr__(name)


class Other(Layer):
    pass


class Own(nn.Parameter):
    pass


def attribute(name: str, value) -> Callable[[Layer], None]:
    return lambda layer: setattr(layer, name, value)


def data(change: Callable[[Tensor], Tensor]) -> Callable[[Layer], None]:
    def changed(layer: Layer) -> None:
        layer.weight.data = change(layer.weight.data)

    return changed


def quietly(edit: Callable[[Layer], object]) -> Callable[[Layer], object]:
    return torch.no_grad()(edit)


def reordered(layer: Layer) -> None:
    layer.bias, weight = nn.Parameter(torch.ones(4)), layer.weight
    del layer.weight
    layer.weight = weight


def renamed(layer: Layer) -> None:
    norm = layer.norm
    del layer.norm
    layer.other = norm


def loaded(layer: Layer, **options) -> None:
    state = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, **options)


def step(layer: Layer) -> None:
    """As if of a fused optimizer, which counts nothing in tensors."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()


def batch_seen(layer: Layer) -> None:
    layer.norm.num_batches_tracked.data += 1


EDITS: dict[str, tuple[Callable[[Layer], object], Change]] = {
    # Nothing that matters.
    "nothing": (lambda layer: None, SAME),
    "evaluation again": (lambda layer: layer.eval(), SAME),
    "the same parameter": (lambda layer: setattr(layer, "weight", layer.weight), SAME),
    "gradients there": (lambda layer: layer.weight.sum().backward(), SAME),
    "a forward": (lambda layer: layer.norm(torch.ones(1, 4, 2, 2)), SAME),
    "hook and back": (lambda layer: layer.register_forward_hook(print).remove(), SAME),
    # Tensors.
    "parameter in place": (quietly(lambda layer: layer.weight.mul_(2)), WEIGHTS),
    "one element in place": (quietly(lambda layer: layer.weight[1, 1, 0, 1].add_(1)), WEIGHTS),
    "parameter": (lambda m: setattr(m, "weight", nn.Parameter(torch.ones(4, 3, 3, 3))), WEIGHTS),
    "parameter of the same memory": (
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data)),
        WEIGHTS,
    ),
    "other data": (data(torch.clone), WEIGHTS),
    "requires_grad": (lambda layer: layer.bias.requires_grad_(False), WEIGHTS),
    "buffer in place": (lambda layer: layer.norm.running_mean.add_(1), WEIGHTS),
    "buffer": (lambda layer: setattr(layer.norm, "running_var", torch.ones(4)), WEIGHTS),
    "counter in place": (lambda layer: layer.norm.num_batches_tracked.add_(1), WEIGHTS),
    "attribute in place": (lambda layer: layer.scale.add_(1), WEIGHTS),
    "tensor in a list in place": (lambda layer: layer.scales[0].add_(1), WEIGHTS),
    "state loaded": (loaded, WEIGHTS),
    "state assigned": (lambda layer: loaded(layer, assign=True), WEIGHTS),
    "swapped": (
        lambda m: torch.utils.swap_tensors(m.weight, nn.Parameter(torch.ones(4, 3, 3, 3))),
        WEIGHTS,
    ),
    "more memory": (lambda layer: layer.weight.untyped_storage().resize_(4096), WEIGHTS),
    "step of an optimizer": (step, WEIGHTS),
    "a batch in training": (
        lambda layer: (layer.norm.train()(torch.ones(2, 4, 2, 2)), layer.norm.eval()),
        WEIGHTS,
    ),
    # Writes that are not counted.
    "data in place": (lambda layer: layer.weight.data.mul_(0.9), WEIGHTS),
    "data of a small buffer": (lambda layer: layer.norm.running_var.data.mul_(0.9), WEIGHTS),
    "data of a counter": (batch_seen, WEIGHTS),
    "NumPy": (lambda layer: layer.weight.detach().numpy().__imul__(0.9), WEIGHTS),
    "foreach": (
        lambda layer: torch._foreach_mul_([p.data for p in layer.parameters()], 0.9),
        WEIGHTS,
    ),
    "negative zero": (lambda layer: layer.norm.bias.data.neg_(), WEIGHTS),
    "shared memory": (lambda layer: layer.share_memory(), WEIGHTS),
    # Anything else.
    "training": (lambda layer: layer.train(), STRUCTURE),
    "attribute": (attribute("stride", (2, 2)), STRUCTURE),
    "equal attribute of another identity": (attribute("padding", tuple([0, 0][:])), STRUCTURE),
    "new attribute": (attribute("forward", lambda x: x), STRUCTURE),
    "deleted attribute": (lambda layer: delattr(layer, "named"), STRUCTURE),
    "item of a list": (lambda layer: layer.sizes.__setitem__(0, 3), STRUCTURE),
    "longer list": (lambda layer: layer.sizes.append(3), STRUCTURE),
    "list in a list": (lambda layer: layer.nested[0].append(2), STRUCTURE),
    "list in a tuple in a list": (lambda layer: layer.nested[1][1].append(2), STRUCTURE),
    "list in a named tuple": (lambda layer: layer.settings.sizes.append(2), STRUCTURE),
    "dictionary of the object": (lambda m: setattr(m, "__dict__", {**vars(m)}), STRUCTURE),
    "class": (attribute("__class__", Other), STRUCTURE),
    "class of a child": (lambda m: setattr(m.act, "__class__", nn.ReLU6), STRUCTURE),
    "child": (attribute("norm", nn.BatchNorm2d(4)), STRUCTURE),
    "new child": (attribute("further", nn.Identity()), STRUCTURE),
    "child renamed": (renamed, STRUCTURE),
    "child without parameters": (attribute("act", nn.ReLU()), STRUCTURE),
    "attribute of a child": (lambda layer: setattr(layer.norm, "eps", 0.5), STRUCTURE),
    "no parameter": (attribute("bias", None), STRUCTURE),
    "deleted parameter": (lambda layer: delattr(layer, "bias"), STRUCTURE),
    "new parameter": (lambda m: setattr(m, "extra", nn.Parameter(torch.ones(1))), STRUCTURE),
    "new buffer": (lambda m: m.register_buffer("extra", torch.ones(1)), STRUCTURE),
    "no buffer": (lambda layer: setattr(layer.norm, "running_mean", None), STRUCTURE),
    "order of parameters": (reordered, STRUCTURE),
    "parameter of another class": (
        lambda layer: setattr(layer, "weight", Own(layer.weight.data)),
        STRUCTURE,
    ),
    "parameter of another shape": (
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(4, 3, 1, 1))),
        STRUCTURE,
    ),
    "size in place": (quietly(lambda layer: layer.norm.running_var.resize_(2)), STRUCTURE),
    "part of the data": (data(lambda t: t[:2]), STRUCTURE),
    "the same data in another layout": (data(lambda t: t.transpose(2, 3)), STRUCTURE),
    "the same data as another type": (data(lambda t: t.view(torch.float16)), STRUCTURE),
    "channels last": (lambda layer: layer.to(memory_format=torch.channels_last), STRUCTURE),
    "double": (lambda layer: layer.double(), STRUCTURE),
    "half": (lambda layer: layer.half(), STRUCTURE),
    "another device": (lambda layer: layer.to("meta"), STRUCTURE),
    "freed memory": (lambda layer: layer.weight.untyped_storage().resize_(0), STRUCTURE),
    "tensor that cannot be seen": (lambda m: setattr(m, "scale", m.scale.to_sparse()), STRUCTURE),
    "list that cannot be seen": (lambda layer: layer.sizes.append(layer.sizes), STRUCTURE),
    "hook": (lambda layer: layer.register_forward_hook(print), STRUCTURE),
    "hook before": (lambda layer: layer.norm.register_forward_pre_hook(print), STRUCTURE),
    "hook of gradients": (lambda layer: layer.register_full_backward_hook(print), STRUCTURE),
    "hooks in a new dictionary": (attribute("_forward_hooks", OrderedDict(a=print)), STRUCTURE),
    "no dictionary of hooks": (lambda layer: delattr(layer, "_forward_hooks"), STRUCTURE),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
        STRUCTURE,
    ),
    "pruned": (lambda m: prune.random_unstructured(m, "weight", 0.5), STRUCTURE),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_kind_of_edit(name):
    edit, expected = EDITS[name]
    layer = Layer().eval()
    torch.nn.init.normal_(layer.norm.running_var)
    guard = Guard(layer.modules())
    assert guard.watches and guard.why_blind is None
    assert guard.check() is SAME and guard.check() is SAME
    edit(layer)
    assert guard.check() is expected
    # Weights of now are known then; a change of structure is the end.
    assert guard.check() is (STRUCTURE if expected is STRUCTURE else SAME)
    assert guard.watches


def test_exactly_the_modules_that_are_given():
    layer = Layer()
    outer, inner = Guard([layer]), Guard([layer.norm])
    layer.norm.eps = 0.5
    assert outer.check() is SAME and inner.check() is STRUCTURE


def test_the_least_differences():
    """Every tensor and attribute of many modules, one at a time."""
    model = nn.ModuleList(Layer().eval() for _ in range(20))
    guard = Guard(model.modules())
    for layer in model:
        before = layer.scale
        for value in (torch.ones(2), before):
            layer.scale = value
            assert guard.check() is WEIGHTS
            assert guard.check() is SAME
    for tensor in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            tensor.add_(1)
        assert guard.check() is WEIGHTS
        tensor.data.add_(1)
        assert guard.check() is WEIGHTS
        assert guard.check() is SAME
    for module in model.modules():
        name = next(iter(vars(module)))
        guard, before = Guard(model.modules()), vars(module)[name]
        vars(module)[name] = object()
        assert guard.check() is STRUCTURE
        vars(module)[name] = before
        assert guard.check() is STRUCTURE, "it may have missed other changes"


def holder(tensor: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("held", tensor)
    return module


TENSORS = {
    "one element": torch.ones(()),
    "a few": torch.arange(8.0),
    "a few, strided": torch.ones(16)[::2],
    "a few, transposed": torch.ones(4, 2).t(),
    "a few, expanded": torch.ones(4, 1).expand(4, 100),
    "one, expanded": torch.ones(()).expand(3, 50),
    "a few behind others": torch.ones(100)[95:],
    "a column": torch.ones(5, 1000)[:, -1],
    "overlapping": torch.ones(4).as_strided((3, 2), (1, 1)),
    **{
        str(t).removeprefix("torch."): torch.ones(5).to(t)
        for t in (torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128)
    },
    **{
        str(t).removeprefix("torch."): torch.ones(5).to(t)
        for t in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn)
    },
}


@pytest.mark.parametrize("name", TENSORS)
def test_each_element_of_small_tensors(name):
    """Each byte of each element, without anybody counting it."""
    tensor = TENSORS[name]
    guard = Guard([holder(tensor)])
    memory = tensor.untyped_storage()
    size, start = tensor.element_size(), tensor.storage_offset()
    indices = itertools.product(*map(range, tensor.shape))
    offsets = {start + sum(map(operator.mul, i, tensor.stride())) for i in indices}
    for at in {offset * size + byte for offset in offsets for byte in range(size)}:
        memory[at] = memory[at] ^ 1
        assert guard.check() is WEIGHTS
        assert guard.check() is SAME


@pytest.mark.parametrize("shape", [(9,), (100,), (64, 3, 3, 3), (3, 1001), (2, 1, 8, 1)])
@pytest.mark.parametrize("view", ["plain", "transposed", "strided", "flipped back"])
def test_elements_that_are_compared(shape, view):
    """Eight elements, first and last among them, and no ninth of the tensor without any."""
    base = torch.zeros(*shape, 2)
    tensor = {
        "plain": lambda: base[..., 0].clone(),
        "transposed": lambda: base[..., 0].clone().transpose(0, -1),
        "strided": lambda: base[..., 0],
        "flipped back": lambda: base.flip(0)[..., 0],
    }[view]()
    guard = Guard([holder(tensor)])
    indices = [*itertools.product(*map(range, tensor.shape))]
    seen = []
    for number, index in enumerate(indices):
        tensor.data[index] = 1
        if guard.check() is WEIGHTS:
            seen.append(number)
    assert len(seen) == 8 and seen[0] == 0 and seen[-1] == len(indices) - 1
    assert max(b - a for a, b in zip(seen, seen[1:], strict=False)) <= len(indices) // 7 + 1


def test_bits_of_what_is_no_number():
    layer = Layer()
    layer.bias.data.fill_(float("nan"))
    guard = Guard([layer])
    assert guard.check() is SAME
    layer.bias.data.view(torch.int32).bitwise_xor_(1)
    assert layer.bias.isnan().all()
    assert guard.check() is WEIGHTS


def test_parameters_that_are_views_of_one_vector():
    layer = Layer()
    vector = nn.utils.parameters_to_vector(layer.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, layer.parameters())
    guard = Guard(layer.modules())
    vector.mul_(0.9)
    assert guard.check() is WEIGHTS and guard.check() is SAME


def test_memory_shared_with_another_process():
    layer = Layer().share_memory()
    guard = Guard(layer.modules())
    array = layer.norm.weight.detach().numpy()
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        assert guard.check() is SAME
        child = context.Process(target=array.__iadd__, args=(1,))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert guard.check() is WEIGHTS


def test_tensors_of_no_elements():
    layer = holder(torch.ones(0, 3))
    guard = Guard([layer])
    assert guard.check() is SAME
    layer.held = torch.ones(0, 3)
    assert guard.check() is WEIGHTS
    layer.held = torch.ones(0, 4)
    assert guard.check() is STRUCTURE


@pytest.mark.parametrize(
    "fill",
    [
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.load_state_dict(Layer().state_dict(), assign=True),
        lambda m: setattr(m, "weight", Layer().weight),
    ],
)
def test_models_on_the_meta_device(fill):
    with torch.device("meta"):
        layer = Layer()
    guard = Guard(layer.modules())
    assert guard.watches and guard.check() is SAME
    layer.weight.data = layer.weight.data.clone()
    assert guard.check() is WEIGHTS
    fill(layer)
    assert guard.check() is STRUCTURE
    assert Guard(layer.modules()).watches


def test_inference_tensors():
    with torch.inference_mode():
        layer = Layer()
    guard = Guard(layer.modules())
    assert guard.check() is SAME
    with torch.inference_mode():
        layer.weight.mul_(2)
    assert guard.check() is WEIGHTS
    layer.bias = None
    assert guard.check() is STRUCTURE


def test_requires_grad():
    layer = Layer()
    guard = Guard(layer.modules())
    assert guard.requires_grad
    layer.requires_grad_(False)
    assert guard.requires_grad, "as of the last look"
    assert guard.check() is WEIGHTS
    assert not guard.requires_grad
    layer.norm.bias.requires_grad_()
    assert guard.check() is WEIGHTS
    assert guard.requires_grad


def old_model() -> nn.Sequential:
    """As one that is unpickled from a checkpoint of an old PyTorch."""
    model = nn.Sequential(Layer(), nn.ReLU(), Layer())
    for module in model.modules():
        for name in ("_modules", "_parameters", "_buffers"):
            vars(module)[name] = OrderedDict(vars(module)[name])
    return model


@pytest.mark.parametrize(
    ["edit", "expected"],
    [
        (lambda m: None, SAME),
        (lambda m: m._modules.move_to_end("2"), SAME),
        (lambda m: m._modules.move_to_end("0"), STRUCTURE),
        (lambda m: m._modules.move_to_end("2", last=False), STRUCTURE),
        (lambda m: m[0]._parameters.move_to_end("weight"), STRUCTURE),
        (lambda m: m[0]._parameters["bias"].data.add_(1), WEIGHTS),
        (lambda m: m[2]._buffers.clear(), SAME),
        (lambda m: m[2].norm._buffers.popitem(), STRUCTURE),
        (lambda m: m.append(nn.ReLU()), STRUCTURE),
        (lambda m: m[1]._forward_hooks.move_to_end(-1), STRUCTURE),
        (lambda m: m[1]._forward_hooks.clear(), STRUCTURE),
    ],
)
def test_ordered_dictionaries(edit, expected):
    model = old_model()
    model[1]._forward_hooks.update({-1: print, -2: print})
    guard = Guard(model.modules())
    assert guard.watches and guard.check() is SAME
    edit(model)
    assert guard.check() is expected


class Ordered(dict):
    pass


class OrderedToo(OrderedDict):
    def __iter__(self):
        raise AssertionError("not to be called")


class Key(str):
    __hash__ = str.__hash__

    def __eq__(self, other):
        raise AssertionError("not to be called")


class Computed(nn.BatchNorm2d):
    eps = property(lambda self: 0.5, lambda self, value: None)


class Descriptor:
    def __get__(self, module, kind):
        return (1, 1)


class Described(nn.Module):
    stride = Descriptor()


class Slotted(nn.Module):
    __slots__ = ("padding",)


class Watching(nn.Module):
    def __getattribute__(self, name):
        return super().__getattribute__(name)


def with_dict(name: str, content) -> nn.Module:
    module = nn.Module()
    vars(module)[name] = content
    return module


def with_attribute(value) -> nn.Module:
    return with_dict("held", value)


def endless() -> list:
    items: list = []
    items.append(items)
    return items


def fake() -> nn.Module:
    with FakeTensorMode():
        return nn.Linear(2, 2)


def freed() -> nn.Module:
    module = nn.Linear(2, 2)
    module.weight.untyped_storage().resize_(0)
    return module


def functional() -> Tensor:
    return torch._to_functional_tensor(torch.ones(2))


def quantized() -> Tensor:
    return torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8)


BLIND: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a property": (lambda: Computed(4), "Computed.eps"),
    "a descriptor": (Described, "Described.stride"),
    "a slot": (Slotted, "Slotted.padding"),
    "every attribute": (Watching, "Watching.__getattribute__"),
    "a list in itself": (lambda: with_attribute(endless()), "too long or too deep"),
    "a long list": (lambda: with_attribute([0] * 5000), "too long or too deep"),
    "a scripted module": (lambda: torch.jit.script(nn.Linear(2, 2)), "RecursiveScriptModule"),
    "a subclass of dict": (lambda: with_dict("_buffers", Ordered(a=None)), "Ordered"),
    "a subclass of OrderedDict": (
        lambda: with_dict("_modules", OrderedToo(a=None)),
        "OrderedToo",
    ),
    "keys of a class of their own": (
        lambda: with_dict("_modules", OrderedDict({Key("a"): None})),
        "keys other than names",
    ),
    "no dict": (lambda: with_dict("_modules", None), "no dict but a NoneType"),
    "fake tensors": (fake, "FakeTensor"),
    "a sparse tensor": (lambda: with_attribute(torch.ones(2, 2).to_sparse()), "Tensor"),
    "a nested tensor": (
        lambda: with_attribute(torch.nested.nested_tensor([torch.ones(2)])),
        "Tensor",
    ),
    "a quantized tensor": (lambda: with_attribute(quantized()), "Tensor"),
    "a functional tensor": (lambda: with_attribute(functional()), "Tensor"),
    "freed memory": (freed, "less memory than its shape"),
    "a lazy module": (lambda: nn.LazyLinear(3), "LazyLinear is not initialised"),
}


@pytest.mark.parametrize("name", BLIND)
def test_changes_that_cannot_be_seen(name):
    build, words = BLIND[name]
    guard = Guard([nn.ReLU(), build()])
    assert not guard.watches and words in guard.why_blind
    assert guard.check() is STRUCTURE and guard.check() is STRUCTURE
    assert not guard.requires_grad


def test_a_missing_dictionary():
    module = nn.ReLU()
    del module._backward_hooks
    guard = Guard([module])
    assert guard.why_blind == "a ReLU has no _backward_hooks"


def test_empty_dictionaries_of_any_class():
    module = with_dict("_buffers", OrderedToo())
    guard = Guard([module])
    assert guard.watches and guard.check() is SAME
    dict.__setitem__(module._buffers, "a", None)
    assert guard.check() is STRUCTURE


class Strange(list):
    def __getitem__(self, index):
        raise AssertionError("not to be called")

    __iter__ = __len__ = __eq__ = __bool__ = __getitem__
    __hash__ = None


@pytest.mark.parametrize("inside", [False, True])
def test_strange_attributes_are_only_looked_at(inside):
    strange = Strange([1, 2])
    module = with_attribute([strange] if inside else strange)
    vars(module)["gone"] = weakref.proxy(Layer())
    guard = Guard([module])
    assert guard.check() is SAME
    list.append(strange, 3)
    assert guard.check() is STRUCTURE


def test_steps_of_optimizers():
    before = optimizer_steps()
    torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()
    assert optimizer_steps() == before + 1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda g: pickle.loads(pickle.dumps(g))]
)
def test_copies_watch_nothing(copied):
    class Owner(nn.Linear):
        pass

    guard = Guard([nn.ReLU()])
    other = copied(guard)
    assert guard.check() is SAME
    assert other.check() is STRUCTURE and not other.watches and other.why_blind is None
    owner = nn.Linear(2, 2)
    owner.guard = Guard([owner])
    assert copied(owner if copied is copy.deepcopy else [owner.guard]) is not None


def test_two_guards_of_one_module():
    layer = Layer()
    first, second = Guard(layer.modules()), Guard(layer.modules())
    layer.weight.data.add_(1)
    assert first.check() is WEIGHTS and first.check() is SAME
    assert second.check() is WEIGHTS and second.check() is SAME
    layer.stride = (2, 2)
    assert first.check() is STRUCTURE and second.check() is STRUCTURE


def test_the_same_module_twice():
    layer = Layer()
    guard = Guard([layer, layer])
    layer.weight.data.add_(1)
    assert guard.check() is WEIGHTS and guard.check() is SAME


def test_no_modules():
    guard = Guard([])
    assert guard.watches and guard.check() is SAME and not guard.requires_grad


def test_garbage_collection():
    layer = Layer()
    layer.guard = Guard(layer.modules())
    gc.collect()
    vars(layer).pop("guard").check()
    guard = layer.guard = Guard([layer.norm])
    for _ in range(3):
        gc.collect()
        assert guard.check() is SAME
    gone = weakref.ref(layer), weakref.ref(layer.norm)
    del layer, guard
    gc.collect()
    assert not any(module() for module in gone)


def test_old_weights_are_let_go():
    layer = Layer()
    guard = Guard(layer.modules())
    gone = [weakref.ref(layer.weight), weakref.ref(layer.norm.running_var)]
    layer.weight = nn.Parameter(torch.ones(4, 3, 3, 3))
    layer.norm.running_var = torch.ones(4)
    assert guard.check() is WEIGHTS
    assert not any(tensor() is not None for tensor in gone)
    child = weakref.ref(layer.norm)
    layer.norm = nn.BatchNorm2d(4)
    assert guard.check() is STRUCTURE
    gc.collect()
    assert child() is None


def test_a_callback_of_an_old_weight_may_ask_again():
    layer = Layer()
    guard = Guard(layer.modules())
    answers = []
    weakref.finalize(layer.weight, lambda: answers.append(guard.check()))
    layer.weight = nn.Parameter(torch.ones(4, 3, 3, 3))
    assert guard.check() is WEIGHTS
    assert answers == [SAME]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_memory_stays_level(kind):
    """1000 weights of 1 MB, one after the other."""
    layer = nn.Linear(512, 512)
    guard = Guard([layer])

    def replace(times: int) -> None:
        for _ in range(times):
            layer.weight = nn.Parameter(torch.zeros(512, 512))
            assert guard.check() is WEIGHTS
            layer.weight.data = torch.zeros(512, 512)
            assert guard.check() is WEIGHTS
            assert guard.check() is SAME

    replace(20)
    before, objects = peak(), len(gc.get_objects())
    replace(1000)
    assert peak() - before < 64
    assert len(gc.get_objects()) - objects < 100
    for _ in range(1000):
        Guard([layer]).check()
    assert peak() - before < 64


def test_threads_are_told_of_each_change_once():
    layer = Layer()
    guard = Guard(layer.modules())
    answers, done = [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            answer = guard.check()
            if answer is not SAME:
                answers.append(answer)
            time.sleep(0)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 51):
            layer._parameters["weight"] = nn.Parameter(torch.ones(4, 3, 3, 3))
            end = time.monotonic() + 60
            while len(answers) < number and time.monotonic() < end:
                time.sleep(0.0001)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert answers == [WEIGHTS] * 50


# Edits that do something only the first time, or are refused where others came before.
ONCE = {"requires_grad", "more memory", "shared memory", "swapped"}


@pytest.mark.parametrize("seed", range(5))
def test_random_edits(seed):
    """One to three edits, and then the gravest of their answers."""
    choose = random.Random(seed)
    names = [name for name in EDITS if name not in ONCE]
    for _ in range(12):
        model = nn.ModuleList(Layer().eval() for _ in range(4))
        guard = Guard(model.modules())
        answer = SAME
        while answer is not STRUCTURE:
            edits = []
            for layer in choose.sample([*model], choose.randint(1, 3)):
                edit, expected = EDITS[choose.choice(names)]
                edit(layer)
                edits.append(expected)
            answer = max(edits, key=lambda change: change.value)
            assert guard.check() is answer
