"""Blocks among the children of an nn.Sequential: they stay usable, in slices and copies too."""

import copy
import pickle
import random

import pytest
import torch
from chains import assert_same, fuse, image, mobilenet_v1, pair, spans
from foreign_blocks import (
    conv_norm_act,
    largest_difference,
)
from same_answers import randomise
from torch import nn

import mnv2_kernels as mk
from mnv2_kernels.ops.backends import ran

pytestmark = pytest.mark.usefixtures("one_thread")


def fused_calls() -> int:
    return ran().get("reference", 0)


def test_all_pairs_run_in_one_pass():
    model = mobilenet_v1()
    assert spans(model) == ["[3:9]", "[9:15]", "[15:21]"]
    fused = fuse(model)
    assert isinstance(fused, nn.Sequential)
    assert spans(fused) == ["[3:9]", "[9:15]", "[15:21]"]
    assert all(row.state == "fused" for row in mk.explain(fused))
    before = fused_calls()
    assert_same(fused, model, image())
    assert fused_calls() == before + 3


def test_container_keeps_children_names_and_keys():
    model = mobilenet_v1()
    children = list(model)
    fused = fuse(model, inplace=True)
    assert isinstance(fused, nn.Sequential)
    assert len(fused) == len(children)
    assert all(a is b for a, b in zip(fused, children, strict=True))
    assert fused[-1] is children[-1]
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model.named_modules()]
    assert mk.unfuse(fused, inplace=True) is model


def test_children_called_one_by_one_are_the_layers():
    model = mobilenet_v1()
    x = y = image()
    for layer in fuse(model):
        y = layer(y)
    with torch.no_grad():
        assert torch.equal(y, model(x))


def test_every_slice_computes_its_layers():
    model = mobilenet_v1()
    fused = fuse(model)
    inputs = [image()]
    for layer in model:
        inputs.append(layer(inputs[-1]).detach())
    count = len(model)
    for start in range(count):
        for stop in range(start + 1, count + 1):
            part = fused[start:stop]
            assert list(part) == list(fused)[start:stop]
            with torch.no_grad():
                difference = largest_difference(part(inputs[start]), inputs[stop])
            assert difference < 1e-12, (start, stop)
            whole = [n for n in (3, 9, 15) if start <= n and n + 6 <= stop]
            assert [row.state for row in mk.explain(part)].count("fused") == len(whole)


def test_slices_with_steps_and_negative_ends():
    model = mobilenet_v1()
    fused = fuse(model)
    assert spans(fused[3:-4]) == ["[0:6]", "[6:12]", "[12:18]"]
    assert list(fused[::2]) == list(fused)[::2]
    assert spans(fused[::2]) == []
    assert fused[3:9].training is False


def test_slice_of_a_slice():
    model = mobilenet_v1()
    part = fuse(model)[3:21][6:]
    assert spans(part) == ["[0:6]", "[6:12]"]
    assert_same(part, model[9:21], image(16))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.__setitem__(5, nn.Mish()),
        lambda m: m.__setitem__(0, nn.Conv2d(3, 8, 1).double()),
        lambda m: m.append(nn.Sigmoid()),
        lambda m: m.insert(6, nn.Tanh()),
        lambda m: m.__delitem__(5),
        lambda m: m.__delitem__(slice(3, 5)),
        lambda m: m.pop(-1),
        lambda m: m.extend([nn.Sigmoid()]),
        lambda m: (m.__delitem__(5), m.append(nn.Sigmoid())),
    ],
    ids=["exchange", "outside", "append", "insert", "delete", "cut", "pop", "extend", "both"],
)
def test_changed_container_computes_what_it_holds(change):
    model = mobilenet_v1()
    fused = fuse(model)
    for container in (model, fused):
        torch.manual_seed(1)
        change(container)
    assert_same(fused, model, image())
    again = mk.unfuse(fused)
    assert type(again) is nn.Sequential
    assert len(again) == len(model)
    assert_same(again, model, image())
    assert_same(fuse(again), model, image())


def test_hooks_on_children_are_called():
    fused = fuse(mobilenet_v1())
    for index in (0, 4, 5, 23):
        calls = []
        handle = fused[index].register_forward_hook(lambda *args, calls=calls: calls.append(args))
        with torch.no_grad():
            fused(image())
        handle.remove()
        assert len(calls) == 1


def test_hooks_on_the_container_are_called_once():
    model = mobilenet_v1()
    calls = []
    model.register_forward_hook(lambda *args: calls.append(args))
    fuse(model, inplace=True)(image())
    assert len(calls) == 1


def test_training_runs_the_layers_with_batch_statistics():
    model = mobilenet_v1()
    fused = fuse(model)
    x = image()
    results = []
    for container in (model, fused):
        container.train()
        y = container(x)
        y.square().sum().backward()
        results.append((y, [p.grad for p in container.parameters()], container.state_dict()))
    (y, grads, state), (z, fused_grads, fused_state) = results
    assert torch.equal(y, z)
    assert all(map(torch.equal, grads, fused_grads))
    assert all(torch.equal(state[name], fused_state[name]) for name in state)
    assert all("training mode" in row.reason for row in mk.explain(fused))
    fused.eval()
    assert_same(fused, model.eval(), x)


def test_gradients_in_evaluation_mode():
    model = mobilenet_v1()
    fused = fuse(model)
    x = image()
    for container in (model, fused):
        container(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_new_weights_are_seen():
    model = mobilenet_v1()
    fused = fuse(model)
    x = image()
    fused(x)
    with torch.no_grad():
        for container in (model, fused):
            container[3].weight.mul_(0.5)
            container[4].running_mean.add_(1)
    assert_same(fused, model, x)
    fused.load_state_dict({k: v / 2 for k, v in model.state_dict().items()})
    model.load_state_dict({k: v / 2 for k, v in model.state_dict().items()})
    assert_same(fused, model, x)
    assert_same(fused.float().double(), model.float().double(), x)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_and_their_own(make):
    model = mobilenet_v1()
    fused = fuse(model)
    again = make(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    before = fused_calls()
    assert_same(again, model, image())
    assert fused_calls() == before + 3


def test_backend_and_verify():
    model = mobilenet_v1()
    fused = mk.fuse(model, verify=True)
    assert {row.backend for row in mk.explain(fused)} != {"reference"}
    mk.fuse(fused, backend="reference", inplace=True)
    assert {row.backend for row in mk.explain(fused)} == {"reference"}


def test_fusing_twice_is_no_different():
    fused = fuse(mobilenet_v1())
    assert fuse(fused, inplace=True) is fused
    assert spans(fused) == ["[3:9]", "[9:15]", "[15:21]"]


def test_a_sequential_that_is_one_block():
    model = randomise(nn.Sequential(nn.Sequential(*pair(8, 16)), nn.Sequential(*pair(16, 8, 2))))
    model.double()
    fused = fuse(model)
    assert spans(fused) == ["0", "1"]
    assert isinstance(fused[0], nn.Sequential)
    assert len(fused[0]) == 6
    assert_same(fused, model, image(8))
    for start, stop in ((0, 3), (3, 6), (0, 6), (1, 2)):
        x = image(8)
        assert_same(fused[0][start:stop], model[0][start:stop], x)
    for container in (model, fused):
        container[0].append(nn.Tanh())
        del container[1][2]
        container[1].append(nn.Tanh())
    assert_same(fused, model, image(8))
    assert_same(mk.unfuse(fused), model, image(8))


def test_folded_as_one_block():
    block = randomise(nn.Sequential(*pair(8, 16))).double()
    x = image(8)
    y = mk.inverted_residual(x, mk.fold(block), backend="reference")
    torch.testing.assert_close(y, block(x))


def random_layers(rng: random.Random, channels: int) -> tuple[list[nn.Module], int]:
    """One to three layers that may or may not be a part of a block, and their result's channels."""
    act = rng.choice([nn.ReLU, nn.ReLU6, nn.Mish, None])
    kind = rng.choice(["depthwise", "depthwise", "1x1", "1x1", "3x3", "other"])
    if kind == "other":
        return [rng.choice([nn.Identity, nn.Tanh, nn.ReLU, lambda: nn.ZeroPad2d(1)])()], channels
    if kind == "depthwise":
        kernel, stride, dilation = rng.choice([3, 5]), rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
        padding = rng.choice([0, 1, kernel // 2 * dilation])
        return conv_norm_act(
            channels, channels, kernel, stride, channels, act, padding, dilation=dilation
        ), channels
    result = rng.choice([4, 6, 8])
    layers = conv_norm_act(channels, result, 1 if kind == "1x1" else 3, act=act)
    return layers[:1] if rng.random() < 0.2 else layers, result


def random_chain(seed: int) -> nn.Sequential:
    rng = random.Random(seed)
    layers, channels = [], 4
    for _ in range(rng.randrange(4, 12)):
        found, channels = random_layers(rng, channels)
        layers += found
    for _ in range(rng.randrange(4)):
        start = rng.randrange(len(layers))
        stop = rng.randrange(start, len(layers)) + 1
        layers[start:stop] = [nn.Sequential(*layers[start:stop])]
    return randomise(nn.Sequential(*layers)).double()


def test_random_chains_and_their_slices():
    blocks = 0
    for seed in range(150):
        torch.manual_seed(seed)
        model = random_chain(seed)
        fused = fuse(model)
        blocks += len(spans(fused))
        for size in ((97, 80), (84, 91)):
            x = image(4, size)
            assert_same(fused, model, x)
            middle = 1 + seed % len(model)
            assert_same(nn.Sequential(fused[:middle], fused[middle:]), model, x)
    # So that the comparison is one of fused blocks.
    assert blocks > 40
