"""What fused models keep between calls: not too often made anew, and let go of when it is old.

Which changes are seen: test_guard.py.
"""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

import mnv2_kernels as mk
from mnv2_kernels.ops.extension import missing
from mnv2_kernels.profiling.variants import plain

pytestmark = [
    pytest.mark.skipif(missing is not None, reason=f"no compiled kernels: {missing}"),
    pytest.mark.usefixtures("one_thread"),
]


def block() -> nn.Module:
    torch.manual_seed(3)
    return InvertedResidual(8, 8, 1, 6).eval()


def chain() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(InvertedResidual(8, 8, 1, 6) for _ in range(3))).eval()


@pytest.fixture(params=[block, chain], ids=["block", "chain"])
def original(request) -> nn.Module:
    return request.param()


@pytest.fixture
def model(original) -> nn.Module:
    return mk.fuse(original)


def image() -> torch.Tensor:
    return torch.randn(1, 8, 9, 7)


class CountsReadings(nn.ReLU6):
    """An activation that counts how often it is called, outside of itself."""

    calls = 0

    def forward(self, x):
        CountsReadings.calls += 1
        return super().forward(x)


@pytest.fixture
def readings(original) -> Callable[[], int]:
    """How often the forward of a block was run since the last question, to read it or plainly."""
    next(iter(original.modules())).apply(_count)
    CountsReadings.calls = 0

    def since() -> int:
        count, CountsReadings.calls = CountsReadings.calls, 0
        return count

    return since


def _count(module: nn.Module) -> None:
    conv = getattr(module, "conv", None)
    if isinstance(conv, nn.Sequential):
        conv[0][2] = CountsReadings()


@torch.no_grad()
def test_forwards_are_read_only_after_changes_of_structure(original, readings, model):
    for _ in range(3):
        model(image())
    readings()
    for _ in range(12):
        model(image())
    assert readings() == 0
    changed = copy.deepcopy(original)
    for part in (model, changed):
        next(part.parameters()).mul_(1.5)
        next(m for m in part.modules() if isinstance(m, nn.BatchNorm2d)).running_var.mul_(4)
    for _ in range(4):
        x = image()
        y, before = model(x), readings()
        torch.testing.assert_close(y, plain(changed)(x), rtol=1e-4, atol=1e-4)
        readings()
        assert before == 0
    model.note = "a change of structure"
    model(image())
    assert readings() > 0


@torch.no_grad()
def test_models_that_change_all_the_time_are_rarely_read(readings, model):
    """Reading takes longer than the layers: these run after a while, three times in a chain."""
    for number in range(300):
        model.number = number
        model(image())
    readings()
    for number in range(64):
        model.number = -number
        model(image())
    assert readings() <= 3 * 64 + 12


@torch.no_grad()
def test_weights_and_back_again(original, model):
    """The memory of the first weights has others by then."""
    x = image()
    weights = [next(part.parameters()) for part in (model, original)]
    first, second = weights[0].data.clone(), weights[0].data.flip(0)
    for data, calls in ((first, 12), (second, 1), (first, 3)):
        for weight in weights:
            weight.data = data
        for _ in range(calls):
            torch.testing.assert_close(model(x), plain(original)(x), rtol=1e-4, atol=1e-4)
        if data is second:
            first.mul_(1.5)


@torch.no_grad()
def test_what_was_dropped_is_not_kept(model):
    model.note = torch.ones(3)
    for _ in range(3):
        model(image())
    part = next(m for m in model.modules() if hasattr(m, "folded_arguments"))
    gone = [weakref.ref(model.note), *map(weakref.ref, part.folded_arguments()[:1])]
    model.note = None
    next(model.parameters()).mul_(2)
    for _ in range(2):
        model(image())
    part.folded_arguments()
    gc.collect()
    assert not any(thing() is not None for thing in gone)


def test_gradients_wanted_now_and_then(model):
    for _ in range(3):
        with torch.no_grad():
            assert not model(image()).requires_grad
    assert model(image()).requires_grad
    with torch.inference_mode():
        assert not model(image()).requires_grad


@torch.no_grad()
def test_shallow_copies_of_a_block_look_for_themselves(model):
    x = image()
    model(x)
    other = copy.copy(model)
    torch.testing.assert_close(other(x), model(x))


@torch.no_grad()
def test_models_that_were_called_are_collected():
    for make in (block, chain):
        model = mk.fuse(make())
        for _ in range(4):
            model(image())
        gone = [weakref.ref(module) for module in model.modules()]
        del model
        gc.collect()
        assert not any(module() for module in gone)


class AddsOnRequest(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = InvertedResidual(8, 8, 1, 2).conv

    def forward(self, x, adds=True):
        y = self.conv(x)
        return x + y if adds else y


@torch.no_grad()
def test_a_call_that_fails_says_nothing_of_others_with_its_arguments():
    """What is kept for further arguments was read with them."""
    original = AddsOnRequest().eval()
    fused, x = mk.fuse(original), torch.randn(1, 8, 6, 5)
    with pytest.raises(RuntimeError, match="channels"):
        fused(torch.randn(1, 9, 6, 5), False)
    for adds in (False, True):
        torch.testing.assert_close(fused(x, adds), original(x, adds))
