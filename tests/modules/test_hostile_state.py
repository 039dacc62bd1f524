"""A failed call, a mode of torch and fusing itself leave nothing changed."""

import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
import torchvision
from answers import answers, assert_same, block, image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mnv2_kernels as mk
from mnv2_kernels.modules.fused_module import FusedModule

pytestmark = pytest.mark.usefixtures("one_thread")


class CountFunctions(TorchFunctionMode):
    def __init__(self):
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


class CountOps(TorchDispatchMode):
    def __init__(self):
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_modes_of_torch():
    """They see what runs, and the answers stay the same, before, inside and after."""
    for model in (block(), nn.Sequential(block(), block())):
        fused = mk.fuse(model)
        truth = answers(model)
        with CountFunctions(), torch.device("cpu"):
            assert_same(fused, truth, "functions")
        with CountOps() as ops:
            assert_same(fused, truth, "ops")
        assert any("mnv2::" in name or "convolution" in name for name in ops.names)
        assert_same(fused, truth, "afterwards")


class Fails(Exception):
    pass


def fail(*args):
    raise Fails


def failures(model: nn.Module):
    """Calls that fail, on the original and on the fused model: name, errors and call."""
    wrong = {k: v[..., :1] for k, v in model.state_dict().items() if v.dim() == 4}
    yield "channels", (RuntimeError, ValueError), lambda m: m(image(2, 7, 9, 7))
    yield "dimensions", (RuntimeError, ValueError), lambda m: m(image(9, 7))
    yield "dtype", (RuntimeError, ValueError, TypeError), lambda m: m(image().double())
    yield "kind", TypeError, lambda m: m(None)
    yield "device", (RuntimeError, ValueError), lambda m: m(image().to("meta"))
    yield "missing keys", RuntimeError, lambda m: m.load_state_dict({})
    yield "shapes", RuntimeError, lambda m: m.load_state_dict(wrong)
    yield "no such device", (RuntimeError, AssertionError), lambda m: m.to("cuda:99")
    yield "integers", TypeError, lambda m: m.to(torch.int8)
    yield "pickle of a lambda", Exception, pickled_with_lambda
    yield "hook", Fails, failing_hook
    yield "no backend", ValueError, lambda m: mk.fuse(m, backend="gpu", inplace=True)
    yield (
        "frozen",
        ValueError,
        lambda m: mk.freeze_bn(nn.Sequential(m, NO_STATISTICS), inplace=True),
    )
    yield "no plan", ValueError, lambda m: mk.plan(nn.Sequential(m, nn.Softmax(1)), (8, 9, 7))


NO_STATISTICS = nn.BatchNorm2d(8, track_running_stats=False)


def pickled_with_lambda(model: nn.Module) -> None:
    handle = model.register_forward_hook(lambda *args: None)
    try:
        pickle.dumps(model)
    finally:
        handle.remove()


def failing_hook(model: nn.Module) -> None:
    handle = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
        fail
    )
    try:
        model(image())
    finally:
        handle.remove()


@pytest.mark.parametrize("chained", [False, True], ids=["alone", "in a chain"])
def test_state_after_failures(chained):
    model = nn.Sequential(block(), block()).eval() if chained else block()
    fused = mk.fuse(model)
    truth, bits = answers(model), answers(fused)
    modules = list(fused.modules())
    for name, errors, call in failures(model):
        for other in (model, fused):
            with pytest.raises(errors):
                call(other)
        assert torch.equal(answers(fused), bits), name
        assert list(map(id, fused.modules())) == list(map(id, modules)), name
    assert torch.equal(answers(mk.unfuse(fused)), truth)
    assert not fused.training and not any(m.training for m in fused.modules())


def test_half_converted():
    """Layers of two dtypes fail as they did, and work again once converted back."""
    model = block()
    fused = mk.fuse(model)
    truth = answers(fused)
    for changed in (model, fused):
        changed.get_submodule("conv.1").half()
        with pytest.raises((RuntimeError, TypeError)):
            answers(changed)
        changed.get_submodule("conv.1").float()
    torch.testing.assert_close(answers(fused), answers(model), rtol=1e-4, atol=1e-4)
    assert (answers(fused) - truth).abs().max() < 0.1


def test_nothing_is_kept_alive():
    """Neither a fused model nor what it was made from outlives the last one who holds it."""
    model = nn.Sequential(block(), block())
    fused = mk.fuse(model, inplace=True)
    answers(fused)
    held = [weakref.ref(m) for m in fused.modules()]
    held += [weakref.ref(m.original) for m in fused.modules() if isinstance(m, FusedModule)]
    weights = [weakref.ref(p) for p in fused.parameters()]
    del model, fused
    gc.collect()
    assert not [ref for ref in held + weights if ref() is not None]


def test_random_state_and_defaults_are_left_alone():
    model = torchvision.models.mobilenet_v2(width_mult=0.35).eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for work in (mk.explain, mk.fuse, partial(mk.fuse, verify=True)):
        work(model)
        assert torch.equal(torch.get_rng_state(), state), work
        assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
