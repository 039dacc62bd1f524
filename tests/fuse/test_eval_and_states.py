"""States a model may be in, and modes, copies and leftovers of one that is fused: right, and fused.

What is edited after `fuse` is in test_edits_after_fuse.py, weights in test_changed_weights.py.
"""

import copy
import io
import pickle
import time

import pytest
import torch
from forwards_of_libraries import with_leftovers
from fused_states import (
    IMAGE,
    STATES,
    answer,
    check,
    make_pair,
    small_network,
    states,
)
from same_answers import enliven, image, ran_fused
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

pytestmark = [pytest.mark.sampled(2), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(params=STATES)
def pair(request):
    """(the layers, the same fused and called twice, x), in evaluation mode."""
    return make_pair(request.param)


def test_every_state_runs_fused(pair):
    _, fused, _ = pair
    assert states(fused) == {"fused"}, str(mk.explain(fused))


def test_eval_changes_no_result(pair):
    plain, fused, x = pair
    before = answer(fused, x)
    for mode in (False, False):
        assert torch.equal(answer(fused.train(mode), x), before)
    assert states(fused) == {"fused"}


def best_times(fused, x, rounds):
    """(CPU time of `eval` and a call, of the call alone), in turns, the least of each."""
    spent = {True: [], False: []}
    with torch.no_grad():
        for i in range(2 * rounds):
            start = time.process_time()
            if i % 2:
                fused.eval()
            fused(x)
            spent[bool(i % 2)].append(time.process_time() - start)
    return min(spent[True]), min(spent[False])


def check_cost_of_eval(fused, x, rounds):
    """At most 3 % of a call, in the best of three measurements on a machine that may be busy."""
    for _ in range(3):
        with_eval, without = best_times(fused, x, rounds)
        if with_eval <= 1.03 * without:
            return
    pytest.fail(f"{with_eval * 1e3:.3f} ms, not {without * 1e3:.3f} ms")


@pytest.mark.serial
def test_eval_before_each_call_costs_little():
    check_cost_of_eval(mk.fuse(mobilenet_v2().eval()), image(1, 3, 224, 224), 20)


@pytest.mark.serial
def test_eval_before_each_call_of_a_block_costs_little():
    block = TorchvisionBlock(64, 64, 1, 6).eval()
    check_cost_of_eval(mk.fuse(block), image(1, 64, 56, 56), 40)


def test_training_and_back(pair):
    """Cycles of training and evaluation: results and running statistics as the layers'."""
    plain, fused, x = pair
    for turn in range(3):
        for model in (plain.train(), fused.train()):
            torch.manual_seed(turn)
            model(x + turn).square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=1e-4).step()
            model.zero_grad()
        check_near(fused, plain)
        fused.load_state_dict(plain.state_dict())
        check(plain.eval(), fused.eval(), x, f"turn {turn}")
    assert states(fused) == {"fused"}


def check_near(fused, plain):
    """Parameters and statistics, in the norm: single values are as exact as sums of floats."""
    for name, expected in plain.state_dict().items():
        error = (fused.state_dict()[name].double() - expected.double()).norm()
        assert error <= 1e-3 * expected.double().norm() + 1e-6, name


def set_norms(model, training):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(training)


def set_drops(model, training):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train(training)


def test_norms_in_evaluation_mode_in_a_model_in_training_mode(pair):
    """How detection code freezes norms; nothing else in these models asks for the mode."""
    plain, fused, x = pair
    for model in (plain, fused):
        model.train()
        set_norms(model, False)
        set_drops(model, False)
    buffers = copy.deepcopy(dict(plain.named_buffers()))
    check(plain, fused, x)
    assert states(fused) == {"fused"}, str(mk.explain(fused))
    for name, buffer in fused.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_norms_in_training_mode_in_a_model_in_evaluation_mode(pair):
    plain, fused, x = pair
    for model in (plain, fused):
        set_norms(model, True)
    check(plain, fused, x)
    check_near(fused, plain)
    fused.load_state_dict(plain.state_dict())
    for model in (plain, fused):
        set_norms(model, False)
    check(plain, fused, x)
    assert states(fused) == {"fused"}


def test_frozen_norms(pair):
    """`freeze_bn` of a fused model; training mode and evaluation mode in turns after it."""
    plain, fused, x = pair
    frozen = mk.freeze_bn(fused)
    for _ in range(2):
        frozen.train()
        set_drops(frozen, False)
        check(plain, frozen, x)
        frozen.eval()
        check(plain, frozen, x)
        assert states(frozen) == {"fused"}
    check(plain, fused, x)


def test_leftovers_that_come_and_go(pair):
    """A profiler registers its buffers on every module of a fused model, and removes them."""
    plain, fused, x = pair
    for _ in range(2):
        with_leftovers(fused)
        check(plain, fused, x)
        assert states(fused) == {"fused"}
        for module in fused.modules():
            del module.total_ops, module.total_params
        check(plain, fused, x)
        assert states(fused) == {"fused"}


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file, copy.copy])
def test_copies(pair, copied):
    """A copy is as right and as fused as what it was made of, whose weights may change after."""
    plain, fused, x = pair
    other = copied(fused)
    check(plain, other, x)
    assert states(other) == {"fused"}
    if copied is not copy.copy:
        for p in fused.parameters():
            p.data.mul_(0.5)
        check(plain, other, x)


def test_copies_of_the_fused_original_can_be_fused_and_unfused(pair):
    plain, fused, x = pair
    again = mk.fuse(mk.unfuse(copy.deepcopy(fused)))
    check(plain, again, x)
    assert states(again) == {"fused"}
    twice = mk.fuse(fused)
    check(plain, twice, x)
    assert states(twice) == {"fused"}


def test_traced_by_fx(pair):
    """`torch.fx` takes a fused model, and what it makes answers the same; also fused again."""
    plain, fused, x = pair
    traced = torch.fx.symbolic_trace(fused)
    check(plain, traced, x)
    check(plain, mk.fuse(traced), x)
    check(plain, mk.fuse(torch.fx.symbolic_trace(plain)), x)


def meta_network():
    with torch.device("meta"):
        return small_network().eval()


@pytest.fixture
def trained():
    torch.manual_seed(0)
    return enliven(small_network(), IMAGE)


def test_fused_without_values_and_filled_afterwards(trained):
    """Built and fused on the meta device, given memory, then weights."""
    fused = mk.fuse(meta_network()).to_empty(device="cpu")
    fused.load_state_dict(trained.state_dict())
    check(trained, fused, IMAGE)
    assert states(fused) == {"fused"}, str(mk.explain(fused))
    assert ran_fused(fused, IMAGE)[0]


def test_fused_without_values_and_assigned(trained):
    fused = mk.fuse(meta_network())
    fused.load_state_dict(trained.state_dict(), assign=True)
    check(trained, fused, IMAGE)
    assert states(fused) == {"fused"}, str(mk.explain(fused))
    assert ran_fused(fused, IMAGE)[0]


def test_values_taken_away_and_given_back(trained):
    """A fused model that goes to the meta device and comes back with other weights."""
    fused = mk.fuse(trained)
    check(trained, fused, IMAGE)
    fused = fused.to("meta").to_empty(device="cpu")
    fused.load_state_dict(trained.state_dict())
    check(trained, fused, IMAGE)
    assert states(fused) == {"fused"}
