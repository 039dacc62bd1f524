"""Blocks whose forwards do more than their children show, or less, or just that.

After `fuse` every one of them answers as its layers do, whatever it is made of; those that are
inverted residuals exactly run as such. Nothing here says how that is found out.
"""

import copy
import re

import pytest
import torch
from forwards_of_libraries import FORWARDS
from same_answers import (
    call,
    doubled,
    gradients,
    image,
    in_double,
    ran_fused,
    randomise,
    unambiguous_input,
    why_other,
    why_other_gradient,
)
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

pytestmark = [pytest.mark.sampled(3), pytest.mark.usefixtures("one_thread")]

TRAINED = [name for name, case in FORWARDS.items() if case.has_gradients]
BLOCKS = [name for name, case in FORWARDS.items() if case.is_block]


def make_pair(case):
    """(the plain module, the same fused), in evaluation mode."""
    torch.manual_seed(0)
    plain = randomise(case.build())
    return plain, mk.fuse(plain)


def tallies(module):
    """The numbers, lists and tensors that a module keeps as attributes."""
    kept = (int, float, list, torch.Tensor)
    return {k: v for k, v in vars(module).items() if type(v) in kept and not k.startswith("_")}


def exact_copy(case, plain):
    return in_double(plain) if case.in_float64 else None


def check_call(case, plain, fused, exact, x, what):
    """A call of all gives the same, does the same to its arguments and to the module."""
    args, kwargs = case.arguments(x)
    truth = truth_after = None
    if exact is not None:
        truth, truth_after = call(exact, *doubled((args, kwargs)))
    expected, expected_after = call(plain, args, kwargs)
    found, found_after = call(fused, args, kwargs)
    assert (reason := why_other(found, expected, truth)) is None, f"{what}: {reason}"
    reason = why_other(found_after, expected_after, truth_after)
    assert reason is None, f"{what}: arguments afterwards, prints: {reason}"
    for name, value in tallies(plain).items():
        reason = why_other(getattr(fused, name), value, exact and getattr(exact, name))
        assert reason is None, f"{what}: its attribute {name}: {reason}"


def test_there_are_enough():
    assert len(FORWARDS) >= 60
    assert len(BLOCKS) >= 25


@pytest.mark.parametrize("name", FORWARDS)
def test_in_evaluation_mode(name):
    """The first call and later ones, other sizes and batches, with and without gradients."""
    case = FORWARDS[name]
    plain, fused = make_pair(case)
    exact = exact_copy(case, plain)
    with torch.no_grad():
        for turn in range(3):
            check_call(case, plain, fused, exact, image(*case.shape, seed=turn), f"call {turn}")
        for batch, size in ((1, 12), (3, 5)):
            if case.shape[2] > 1:
                x = image(batch, 8, size, size)
                check_call(case, plain, fused, exact, x, f"batch {batch}, size {size}")
    check_call(case, plain, fused, exact, image(*case.shape), "with gradients on")
    with torch.inference_mode():
        check_call(case, plain, fused, exact, image(*case.shape), "in inference mode")


@pytest.mark.parametrize("name", TRAINED)
def test_in_training_mode(name):
    """Results, gradients and running statistics of two calls; evaluation mode afterwards."""
    case = FORWARDS[name]
    plain, fused = make_pair(case)
    x = image(*case.shape)
    if case.shape[2] == 1:
        x = x.repeat(4, 1, 1, 1) + image(8, 8, 1, 1)  # Batch norm wants more than one value.
    with torch.no_grad():
        check_call(case, plain, fused, exact_copy(case, plain), x, "before")
    plain.train()
    fused.train()
    exact = exact_copy(case, plain)
    for turn in range(2):
        expected = gradients(plain, case.arguments, x, seed=turn)
        found = gradients(fused, case.arguments, x, seed=turn)
        truth = expected if exact is None else gradients(exact, case.arguments, x.double(), turn)
        assert (reason := why_other(found[0], expected[0])) is None, reason
        assert (reason := why_other_gradient(found[1], expected[1], truth[1])) is None, reason
        assert found[2].keys() == expected[2].keys()
        for key in expected[2]:
            reason = why_other_gradient(found[2][key], expected[2][key], truth[2][key])
            assert reason is None, f"call {turn}, {key}: {reason}"
        buffers = dict(fused.named_buffers())
        for key, buffer in plain.named_buffers():
            assert (reason := why_other(buffers[key], buffer)) is None, f"{key}: {reason}"
    plain.eval()
    fused.eval()
    with torch.no_grad():
        check_call(case, plain, fused, exact_copy(case, plain), x, "evaluation again")


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_in_evaluation_mode(name):
    """Of x and of every parameter, twice."""
    case = FORWARDS[name]
    plain, fused = make_pair(case)
    x = image(*case.shape)
    if case.in_float64:
        x = unambiguous_input(plain, case.arguments, case.shape)
    for turn in range(2):
        truth = None, None, {}
        if case.in_float64:
            truth = gradients(in_double(plain), case.arguments, x.double(), seed=turn)
        expected = gradients(plain, case.arguments, x, seed=turn)
        found = gradients(fused, case.arguments, x, seed=turn)
        assert (reason := why_other(found[0], expected[0], truth[0])) is None, reason
        reason = why_other_gradient(found[1], expected[1], truth[1])
        assert reason is None, f"gradient of x: {reason}"
        for key in expected[2]:
            reason = why_other_gradient(found[2][key], expected[2][key], truth[2].get(key))
            assert reason is None, f"{key}: {reason}"


@pytest.mark.parametrize("name", FORWARDS)
def test_among_blocks(name):
    """The same as one of three modules of an nn.Sequential, where the other two run fused."""
    case = FORWARDS[name]
    torch.manual_seed(0)
    before, after = randomise(TorchvisionBlock(8, 8, 1, 2)), randomise(TorchvisionBlock(8, 8, 1, 2))
    middle = randomise(case.build())
    args, kwargs = case.arguments(image(*case.shape))
    with torch.no_grad():
        out, _ = call(copy.deepcopy(middle), args, kwargs)
    if len(args) > 1 or kwargs or not isinstance(out, torch.Tensor) or out.dim() != 4:
        fused = mk.fuse(nn.ModuleList([before, middle]))
        with torch.no_grad():
            exact = exact_copy(case, middle)
            check_call(case, middle, fused[1], exact, image(*case.shape), "in a list")
        return
    plain = nn.Sequential(before, middle, *([after] if out.shape[1] == 8 else [])).eval()
    fused, exact = mk.fuse(plain), exact_copy(case, plain)
    with torch.no_grad():
        for turn in range(2):
            x = image(*case.shape, seed=turn)
            truth = call(exact, (x.double(),), {})[0] if exact is not None else None
            expected, found = call(plain, (x,), {})[0], call(fused, (x,), {})[0]
            assert (reason := why_other(found, expected, truth)) is None, f"call {turn}: {reason}"


@pytest.mark.parametrize("name", BLOCKS)
def test_runs_fused(name):
    """`explain` says so, and of PyTorch's convolutions none is called."""
    case = FORWARDS[name]
    _, fused = make_pair(case)
    rows = mk.explain(fused)
    assert {row.state for row in rows} == {"fused"}, str(rows)
    x = image(2, 8, 32, 32)
    with torch.no_grad():
        fused(x)
    assert ran_fused(fused, x) == (True, False)


@pytest.mark.parametrize("name", BLOCKS)
def test_can_be_fused(name):
    """Before `fuse`, `explain` says that each block could be."""
    torch.manual_seed(0)
    rows = mk.explain(randomise(FORWARDS[name].build()))
    assert {row.state for row in rows} == {"fusable"}, str(rows)


@pytest.mark.parametrize("name", FORWARDS)
def test_what_is_declined_has_a_sentence(name):
    """A row that does not run fused says why, in words, before `fuse` and after."""
    case = FORWARDS[name]
    plain, fused = make_pair(case)
    for model in (plain, fused):
        for row in mk.explain(model):
            if row.state not in ("fused", "fusable"):
                assert row.reason and re.search(r"[a-z]+ [a-z]+", row.reason), str(row)
                assert "\n" not in row.reason


@pytest.mark.parametrize("name", FORWARDS)
def test_verifies(name):
    """`fuse(verify=True)` has nothing to complain of: what would be wrong was never replaced."""
    torch.manual_seed(0)
    mk.fuse(randomise(FORWARDS[name].build()), verify=True)


@pytest.mark.parametrize("name", FORWARDS)
def test_unfused_it_is_what_it_was(name):
    case = FORWARDS[name]
    plain, fused = make_pair(case)
    args, kwargs = case.arguments(image(*case.shape))
    with torch.no_grad():
        back = mk.unfuse(fused)
        assert type(back) is type(plain)
        expected, found = call(plain, args, kwargs), call(back, args, kwargs)
    for y, z in zip(found, expected, strict=True):
        assert (reason := why_other(y, z)) is None, reason


@pytest.mark.parametrize("name", FORWARDS)
def test_a_plan_is_right_or_declined(name):
    """`plan` of the module by itself: the layers' answer, or a sentence."""
    case = FORWARDS[name]
    torch.manual_seed(0)
    plain = randomise(case.build())
    x = image(*case.shape)
    try:
        plan = mk.plan(copy.deepcopy(plain), tuple(case.shape))
    except ValueError as error:
        assert re.search(r"plan: .*[a-z]+ [a-z]+", str(error))
        return
    with torch.no_grad():
        truth = call(in_double(plain), (x.double(),), {})[0] if case.in_float64 else None
        expected, found = call(plain, (x,), {})[0], plan(x)
    assert (reason := why_other(found, expected, truth)) is None, reason
