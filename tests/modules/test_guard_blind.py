"""Guards of modules: what cannot be seen is said, and looking runs no Python of what is seen."""

import weakref
from collections import OrderedDict
from collections.abc import Callable

import guard_cases
import pytest
import torch
from guard_cases import SAME, STRUCTURE, Layer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mnv2_kernels.modules.guard import Guard

kind = guard_cases.kind


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
