"""Guards of modules, compiled and in Python: every change is seen, and told by its kind."""

import copy
import gc
import pickle
import random
import resource
import threading
import time
import weakref
from collections import OrderedDict

import guard_cases
import pytest
import torch
from guard_cases import EDITS, SAME, STRUCTURE, WEIGHTS, Layer
from torch import nn

from mnv2_kernels.modules.guard import Guard, optimizer_steps

pytestmark = pytest.mark.sampled(2)

kind = guard_cases.kind


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
    # The current weights are known then; a change of structure is the end.
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
