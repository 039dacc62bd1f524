"""Whatever changes the weights of a model that has run is seen by its next call.

Each model is held against the same layers without this package, to which the same is done.
"""

import copy
import gc

import pytest
import torch
from forwards import layers
from other_process import scale_what_arrives
from same_answers import enliven, image
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock
from weight_changes import CHANGES

import mnv2_kernels as mk

pytestmark = [pytest.mark.sampled(4), pytest.mark.usefixtures("one_thread")]

IMAGE, FEATURES = image(2, 3, 32, 32), image(2, 8, 12, 12)


class Own(nn.Module):
    """A class of a user: a stem, blocks with names of its own, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first, self.second = nn.Sequential(*layers()), nn.Sequential(*layers(outputs=16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(self.second(x).mean((2, 3)))


def make_block():
    plain = TorchvisionBlock(8, 8, 1, 3)
    return plain, mk.fuse(enliven(plain, FEATURES)), FEATURES


def make_sequence():
    blocks = [TorchvisionBlock(8, 8, 1, 3), TorchvisionBlock(8, 16, 2, 6)]
    plain = nn.Sequential(*blocks, TorchvisionBlock(16, 16, 1, 6))
    return plain, mk.fuse(enliven(plain, FEATURES)), FEATURES


def make_torchvision():
    plain = mobilenet_v2(width_mult=0.35, num_classes=10)
    return plain, mk.fuse(enliven(plain, IMAGE)), IMAGE


def make_own():
    plain = Own()
    return plain, mk.fuse(enliven(plain, IMAGE)), IMAGE


def make_reference_network():
    """This package's network is fused without `fuse`; torchvision's has the same keys."""
    plain = enliven(mobilenet_v2(width_mult=0.35, num_classes=10), IMAGE)
    own = mk.mobilenet_v2(width_mult=0.35, num_classes=10).eval()
    own.load_state_dict(plain.state_dict())
    return plain, own, IMAGE


MODELS = {
    "torchvision": make_torchvision,
    "block": make_block,
    "sequence": make_sequence,
    "own class": make_own,
    "mk.mobilenet_v2": make_reference_network,
}


@pytest.fixture(params=MODELS)
def pair(request):
    """(the layers, the fused model, x), in evaluation mode, called twice."""
    torch.manual_seed(0)
    plain, fused, x = MODELS[request.param]()
    check(plain, fused, x)
    check(plain, fused, x)
    return plain.eval(), fused, x


def answer(model, x):
    with torch.no_grad():
        return model(x.to(next(model.parameters()).dtype)).float()


def distance(y, z):
    return ((y - z).abs().max() / z.abs().max()).item()


def check(plain, fused, x, what=""):
    expected, found = answer(plain, x), answer(fused, x)
    allowed = 0.2 if next(plain.parameters()).dtype == torch.bfloat16 else 1e-4
    assert distance(found, expected) < allowed, what
    return expected


def check_change(pair, do):
    """What `do` did to both models is seen by the next call, and by the one after it."""
    plain, fused, x = pair
    before = answer(plain, x)
    do([plain, fused])
    after = check(plain, fused, x, "the next call")
    check(plain, fused, x, "the call after it")
    return distance(after, before)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(pair, name):
    moved = check_change(pair, CHANGES[name])
    if not name.startswith("to bfloat16"):
        assert moved > 1e-3, "the change does not show in the layers either"


@pytest.mark.parametrize("name", ["data scaled", "one block through data"])
def test_a_change_is_seen_again_and_again(pair, name):
    """Also where few calls, or many, lie between two changes."""
    for calls in (1, 5, 0, 1):
        assert check_change(pair, CHANGES[name]) > 1e-3
        for _ in range(calls):
            check(*pair)


@pytest.mark.parametrize("name", ["data scaled", "statistics through data"])
def test_a_change_is_seen_where_gradients_are_recorded(pair, name):
    plain, fused, x = pair
    for _ in range(2):
        fused(x).sum().backward()
        fused.zero_grad()
    CHANGES[name]([plain, fused])
    results = []
    for model in (plain, fused):
        y = model(x)
        y.square().mean().backward()
        results.append((y.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert distance(results[1][0], results[0][0]) < 1e-4
    for key, gradient in results[0][1].items():
        error = (results[1][1][key] - gradient).norm() / gradient.norm()
        assert error < 1e-2, key


def test_a_flat_vector_that_is_refilled(pair):
    """After `vector_to_parameters` all parameters are views of one tensor, which is written."""
    plain, fused, x = pair
    vectors = [
        parameters_to_vector(model.parameters()).detach().clone() for model in (plain, fused)
    ]
    for model, vector in zip((plain, fused), vectors, strict=True):
        vector_to_parameters(vector, model.parameters())
    check(*pair)
    check(*pair)

    def refill(models):
        for vector in vectors:
            vector.mul_(0.9)

    assert check_change(pair, refill) > 1e-3
    assert check_change(pair, refill) > 1e-3


def test_tensors_that_were_loaded_with_assign(pair):
    """The loaded tensors are the model's own, and other holders may still write them."""
    plain, fused, x = pair
    states = [copy.deepcopy(model.state_dict()) for model in (plain, fused)]
    for model, state in zip((plain, fused), states, strict=True):
        model.load_state_dict(state, assign=True)
    check(*pair)
    check(*pair)

    def write(models):
        for state in states:
            for tensor in state.values():
                if tensor.is_floating_point():
                    tensor.mul_(0.9)

    assert check_change(pair, write) > 1e-3


def test_toggled_gradients(pair):
    """`requires_grad` of all, of none, of one block: results and gradients as the layers'."""
    plain, fused, x = pair
    names = [name for name, _ in plain.named_parameters()]
    for chosen in (set(), set(names), set(names[: len(names) // 2]), set(names[-1:])):
        for model in (plain, fused):
            for name, p in model.named_parameters():
                p.requires_grad_(name in chosen)
            model.zero_grad()
        y, z = fused(x), plain(x)
        assert y.requires_grad == z.requires_grad == bool(chosen)
        assert distance(y.detach(), z.detach()) < 1e-4
        if chosen:
            y.square().mean().backward()
            z.square().mean().backward()
        for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == (name not in chosen), name
            if p.grad is not None:
                assert (q.grad - p.grad).norm() < 1e-2 * p.grad.norm(), name
    check(*pair)


@pytest.fixture(scope="module")
def scale_elsewhere():
    """Has another process multiply tensors of shared memory by 0.9; one process for all tests."""
    context = torch.multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=scale_what_arrives, args=(inbox, outbox), daemon=True)
    process.start()

    def scale(models):
        for model in models:
            tensors = [p.detach() for p in model.parameters()]
            inbox.put(tensors)
            assert outbox.get(timeout=120) == len(tensors)

    yield scale
    inbox.put(None)
    process.join(60)
    assert process.exitcode == 0
    gc.collect()


def test_another_process_writes_shared_memory(pair, scale_elsewhere):
    """As in asynchronous training: this process serves, the other one trains."""
    plain, fused, x = pair
    plain.share_memory()
    fused.share_memory()
    check(*pair)
    check(*pair)
    assert check_change(pair, scale_elsewhere) > 1e-3
    assert check_change(pair, scale_elsewhere) > 1e-3


@pytest.mark.parametrize("name", ["data scaled", "module replaced", "statistics"])
def test_copies_follow_their_own_weights(pair, name):
    """A change of the copy is seen by the copy and not by the model it was made of."""
    plain, fused, x = pair
    before = answer(fused, x)
    other_plain, other_fused = copy.deepcopy((plain, fused))
    check(other_plain, other_fused, x)
    assert check_change((other_plain, other_fused, x), CHANGES[name]) > 1e-3
    assert distance(answer(fused, x), before) < 1e-6
