"""States a model may be in, and what is done to one that is fused already: right, and fused.

What changes weights is in test_changed_weights.py.
"""

import copy
import io
import pickle
import time
from types import MethodType

import numpy as np
import pytest
import torch
from helpers.forwards import Copied
from helpers.forwards_of_libraries import with_leftovers
from helpers.same_answers import enliven, image, ran_fused
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE, FEATURES = image(2, 3, 32, 32), image(2, 8, 12, 12)


def with_flag(flag):
    block = Copied()
    block.use_res_connect = flag
    return block


def sequence():
    return nn.Sequential(TorchvisionBlock(8, 8, 1, 3), TorchvisionBlock(8, 16, 2, 6))


def small_network():
    return mobilenet_v2(width_mult=0.35, num_classes=10)


# What is fused, and an input for it.
STATES = {
    "block": (lambda: TorchvisionBlock(8, 8, 1, 3), FEATURES),
    "copied block": (Copied, FEATURES),
    "flag 1": (lambda: with_flag(1), FEATURES),
    "flag np.bool_": (lambda: with_flag(np.bool_(True)), FEATURES),
    "leftover buffers": (lambda: with_leftovers(Copied()), FEATURES),
    "sequence": (sequence, FEATURES),
    "network": (small_network, IMAGE),
    "network with leftovers": (lambda: with_leftovers(small_network()), IMAGE),
}


@pytest.fixture(params=STATES)
def pair(request):
    """(the layers, the same fused and called twice, x), in evaluation mode."""
    torch.manual_seed(0)
    build, x = STATES[request.param]
    plain = enliven(build(), x)
    fused = mk.fuse(plain)
    check(plain, fused, x)
    check(plain, fused, x)
    return plain, fused, x


def answer(model, x):
    with torch.no_grad():
        return model(x)


def check(plain, fused, x, what=""):
    """The next two calls answer as the layers do."""
    for _ in range(2):
        expected, found = answer(plain, x), answer(fused, x)
        assert found.shape == expected.shape, what
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error <= 1e-4, what


def states(model):
    return {row.state for row in mk.explain(model)}


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


@pytest.mark.serial
def test_eval_before_each_call_costs_little():
    """At most 3 % of a call of MobileNetV2."""
    fused, x = mk.fuse(mobilenet_v2().eval()), image(1, 3, 224, 224)
    with_eval, without = best_times(fused, x, 30)
    assert with_eval <= 1.03 * without, f"{with_eval * 1e3:.2f} ms, not {without * 1e3:.2f} ms"


@pytest.mark.serial
def test_eval_before_each_call_of_a_block_costs_little():
    fused, x = mk.fuse(TorchvisionBlock(64, 64, 1, 6).eval()), image(1, 64, 56, 56)
    with_eval, without = best_times(fused, x, 60)
    assert with_eval <= 1.03 * without, f"{with_eval * 1e3:.3f} ms, not {without * 1e3:.3f} ms"


def test_training_and_back(pair):
    """Cycles of training and evaluation: results and running statistics as the layers'."""
    plain, fused, x = pair
    for turn in range(3):
        for model in (plain.train(), fused.train()):
            torch.manual_seed(turn)
            model(x + turn).square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=1e-4).step()
            model.zero_grad()
        check(plain.eval(), fused.eval(), x, f"turn {turn}")
    assert states(fused) == {"fused"}


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
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
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


def test_hooks_are_called_and_forgotten(pair):
    """A hook on any convolution sees the values, may change them, and is gone when removed."""
    plain, fused, x = pair
    name = [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)][1]
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        seen = {}
        handles = []
        for model in (plain, fused):

            def hook(module, args, *result, model=model):
                seen.setdefault(model, []).append((result or args)[0].clone())
                return (result or args)[0] * 2

            handles.append(getattr(model.get_submodule(name), register)(hook))
        check(plain, fused, x, register)
        torch.testing.assert_close(seen[fused][0], seen[plain][0], rtol=1e-4, atol=1e-4)
        for handle in handles:
            handle.remove()
        check(plain, fused, x, "removed")
        assert states(fused) == {"fused"}


def edit(do, stays_fused=False):
    return pytest.param(do, stays_fused, id=do.__name__)


def conv_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def depthwise(model):
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)


def equal_child(model):
    name = conv_names(model)[1]
    model.set_submodule(name, copy.deepcopy(model.get_submodule(name)))


def other_activation(model):
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ReLU6))
    model.set_submodule(name, nn.SiLU())


def relu_for_relu6(model):
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ReLU6))
    model.set_submodule(name, nn.ReLU())


def other_bound(model):
    next(m for m in model.modules() if isinstance(m, nn.ReLU6)).max_val = 0.5


def other_norm(model):
    name, norm = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    model.set_submodule(name, nn.GroupNorm(1, norm.num_features))


def no_norm(model):
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    model.set_submodule(name, nn.Identity())


def dilated(model):
    conv = depthwise(model)
    conv.dilation, conv.padding = (2, 2), (2, 2)


def reflecting(model):
    conv = depthwise(model)
    conv.padding_mode, conv._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


def function_of_a_layer(model):
    conv = depthwise(model)
    conv.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), conv)


def function_of_the_model(model):
    plain = type(model).forward
    model.forward = MethodType(lambda self, x: 2 * plain(self, x), model)


def function_of_the_class_in_between(model):
    model.__class__ = type("Doubled", (type(model),), {"forward": lambda self, x: 0 * x})


EDITS = [
    edit(equal_child, True),
    edit(relu_for_relu6, True),
    edit(other_bound),
    edit(other_activation),
    edit(other_norm),
    edit(no_norm),
    edit(dilated),
    edit(reflecting),
    edit(function_of_a_layer),
    edit(function_of_the_model),
    edit(function_of_the_class_in_between),
]


@pytest.mark.parametrize(("do", "stays_fused"), EDITS)
def test_edits_after_fuse_are_followed(pair, do, stays_fused):
    """The next call is that of the edited layers; what is still a block is fused still."""
    plain, fused, x = pair
    for model in (plain, fused):
        do(model)
    check(plain, fused, x)
    if stays_fused:
        assert states(fused) == {"fused"}, str(mk.explain(fused))


@pytest.mark.parametrize("build", [Copied, lambda: TorchvisionBlock(8, 8, 1, 3)])
def test_a_flag_that_is_changed_after_fuse(build):
    """Off, on again, and by values that are as good as True."""
    torch.manual_seed(0)
    plain = enliven(build(), FEATURES)
    fused = mk.fuse(plain)
    check(plain, fused, FEATURES)
    for flag in (False, True, 0, 1, np.bool_(False), np.bool_(True)):
        plain.use_res_connect = fused.use_res_connect = flag
        check(plain, fused, FEATURES, f"{flag!r}")
        assert states(fused) == {"fused"}, str(mk.explain(fused))


def test_flags_inside_a_network_are_changed_after_fuse(trained):
    fused = mk.fuse(trained)
    check(trained, fused, IMAGE)
    for flag in (False, True):
        for model in (trained, fused):
            model.features[3].use_res_connect = flag
        check(trained, fused, IMAGE, f"{flag!r}")
        assert states(fused) == {"fused"}


def test_blocks_inside_a_network_are_replaced_after_fuse(trained):
    """By another block, by a fused one, by something else; the network follows."""
    fused = mk.fuse(trained)
    check(trained, fused, IMAGE)
    channels = trained.features[3].conv[2].out_channels
    block = enliven(TorchvisionBlock(channels, channels, 1, 6), image(2, channels, 8, 8))
    for other in (block, mk.fuse(block), nn.Identity(), nn.ReLU(), copy.deepcopy(block)):
        trained.features[3] = copy.deepcopy(mk.unfuse(other))
        fused.features[3] = other
        check(trained, fused, IMAGE, type(other).__name__)
