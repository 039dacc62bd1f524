"""Layers that run together as one call, in a whole network and in a Sequential alike: with the
model as it is at each call, and only where that is exact.
"""

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from whole_networks import NETWORKS, WHOLE, assert_same, expect, ready

import mnv2_kernels as mk
from mnv2_kernels.ops.extension import missing

pytestmark = [
    pytest.mark.sampled(3),
    pytest.mark.skipif(missing is not None, reason=f"no compiled kernels: {missing}"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module", params=["whole", "sequential"])
def original(request) -> nn.Module:
    if request.param == "whole":
        return ready(NETWORKS["timm"]())
    return ready(NETWORKS["torchvision"]()).features


@pytest.fixture
def model(original) -> nn.Module:
    return mk.fuse(original)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def nth(model: nn.Module, kind: type, index: int) -> nn.Module:
    """One of the modules of a kind, in their order: a pair of models has the same ones."""
    return [m for m in model.modules() if isinstance(m, kind)][index]


def block(model: nn.Module) -> nn.Module:
    kinds = ("InvertedResidual", "FusedInvertedResidual")
    return [m for m in model.modules() if type(m).__name__ in kinds][3]


PLACES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "the model": lambda m: m,
    "the stem": lambda m: nth(m, nn.Conv2d, 0),
    "a norm of the stem": lambda m: nth(m, nn.BatchNorm2d, 0),
    "a block": block,
    "in a block": lambda m: nth(block(m), nn.Conv2d, 1),
    "a norm in a block": lambda m: nth(block(m), nn.BatchNorm2d, 0),
    "the last convolution": lambda m: nth(m, nn.Conv2d, -1),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision(original, watch, x, dtype):
    x = x.to(dtype)
    narrow = copy.deepcopy(original).to(dtype)
    expected = expect(narrow, x)
    of_layers = (narrow(x) - expected).abs().max()
    y = watch(mk.fuse(narrow), x)
    assert y.dtype == dtype and watch.ran == WHOLE
    eps = torch.finfo(dtype).eps
    assert (y - expected).abs().max() <= 2 * of_layers + eps * expected.abs().max()


@torch.no_grad()
def test_sizes_layouts_and_batches(original, model, watch):
    for shape in ((1, 3, 64, 64), (5, 3, 33, 70), (2, 3, 64, 64), (0, 3, 64, 64)):
        x = torch.randn(shape)
        expected = expect(original, x)
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            y = watch(model, laid_out)
            assert y.shape == expected.shape and watch.ran == WHOLE
            if len(x):
                assert_same(y, expected)


@torch.no_grad()
def test_parameters_as_they_are_at_each_call(original, model, watch, x):
    before = model(x)
    changed = copy.deepcopy(original)
    for name, tensor in list(model.state_dict(keep_vars=True).items())[::7]:
        if not tensor.is_floating_point():
            continue
        for part in (model, changed):
            part.state_dict(keep_vars=True)[name].mul_(1.5)
        assert_same(watch(model, x), expect(changed, x))
        assert watch.ran == WHOLE
    model.load_state_dict(original.state_dict())
    assert torch.equal(watch(model, x), before) and watch.ran == WHOLE


@torch.no_grad()
def test_data_in_place(original, model, watch, x):
    """PyTorch does not count such writes."""
    changed = copy.deepcopy(original)
    for place in ("the stem", "a norm in a block", "in a block", "the last convolution"):
        model(x)
        for part in (model, changed):
            PLACES[place](part).weight.data.mul_(1.5)
        assert_same(watch(model, x), expect(changed, x))
        assert watch.ran == WHOLE


@pytest.mark.parametrize("place", ["the model", "a norm of the stem"])
@torch.no_grad()
def test_statistics_follow_batches_in_training_mode(original, model, watch, place):
    """PyTorch does not count what batch norm does to its statistics."""
    x = torch.randn(8, 3, 64, 64)
    model(x)
    changed = copy.deepcopy(original)
    for part in (model, changed):
        of = PLACES[place](part)
        of.train()
        torch.manual_seed(3)  # Dropout draws.
        of(3 * x + 1 if of is part else torch.ones(8, of.num_features, 4, 4))
        of.eval()
    assert_same(watch(model, x), expect(changed, x))
    assert watch.ran == WHOLE


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_hooks_are_called(original, model, watch, x, place):
    seen = []
    model(x)
    handle = PLACES[place](model).register_forward_hook(lambda *args: seen.append(args))
    assert_same(model(x), expect(original, x))
    assert len(seen) == 1
    handle.remove()
    watch(model, x)
    assert len(seen) == 1 and watch.ran == WHOLE


@torch.no_grad()
def test_hooks_of_all_modules_are_called(original, model, watch, x):
    seen = []
    handle = hooks_of_all.register_module_forward_hook(lambda *args: seen.append(args))
    try:
        assert_same(watch(model, x), expect(original, x))
    finally:
        handle.remove()
    assert len(seen) > 20 and watch.ran.together == 0


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def other_forward(module: nn.Module) -> None:
    module.forward = lambda x: 2 * type(module).forward(module, x)


def doubling_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, y: 2 * y)


def parametrized(module: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


def of_clip(index: int, name: str, value) -> Callable[[nn.Module], None]:
    return lambda m: setattr(nth(m, nn.Hardtanh, index), name, value)


# Each changes the result, and is seen by the next call.
CHANGES: dict[str, Callable[[nn.Module], None]] = {
    **{f"forward of {p}": lambda m, p=p: other_forward(PLACES[p](m)) for p in PLACES},
    **{f"hook on {p}": lambda m, p=p: doubling_hook(PLACES[p](m)) for p in PLACES},
    **{
        f"parametrization of {p}": lambda m, p=p: parametrized(PLACES[p](m))
        for p in ("the stem", "in a block")
    },
    "stride of the stem": lambda m: setattr(nth(m, nn.Conv2d, 0), "stride", (1, 1)),
    "eps of a norm": lambda m: setattr(nth(m, nn.BatchNorm2d, 1), "eps", 3.0),
    "bound of a clip": of_clip(0, "max_val", 0.5),
    "bound of a clip in a block": of_clip(5, "max_val", 0.5),
    "class of a clip": of_clip(-1, "__class__", nn.Mish),
}


@pytest.mark.parametrize("first", [True, False], ids=["called before", "not called"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changes_of_the_model(original, model, x, change, first):
    before = model(x) if first else mk.fuse(original)(x)
    changed = copy.deepcopy(original)
    for part in (model, changed):
        change(part)
    for _ in range(2):
        y = model(x)
        assert_same(y, changed(x).double())
        assert y.shape != before.shape or not torch.allclose(y, before)


@torch.no_grad()
def test_changes_that_can_be_read_run_as_one_call_again(original, model, watch, x):
    changed = copy.deepcopy(original)
    for name in ("eps of a norm", "bound of a clip in a block"):
        model(x)
        for part in (model, changed):
            CHANGES[name](part)
        assert_same(watch(model, x), expect(changed, x))
        assert watch.ran == WHOLE


@torch.no_grad()
def test_one_norm_in_training_mode(original, model, watch, x):
    changed = copy.deepcopy(original)
    for part in (model, changed):
        part.requires_grad_(False)
        PLACES["a norm of the stem"](part).train()
    assert_same(watch(model, x), changed(x).double())
    assert watch.ran.convolutions >= 1
    model.eval()
    watch(model, x)
    assert watch.ran == WHOLE


def test_gradients_and_modes(original, model, watch, x):
    original = copy.deepcopy(original)
    watch(model, x)  # Parameters require gradients.
    assert watch.ran.together == 0
    watch(model.train(), x)
    assert (watch.ran.together, watch.ran.blocks) == (0, 17)
    model.eval().load_state_dict(original.state_dict())
    for part in (model, original):
        part(x).sum().backward()
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad.double(), 1e-2)
    model.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    watch(model, leaf).sum().backward()
    assert leaf.grad is not None and watch.ran.together == 0
    assert_same(watch(model, x), expect(original, x))
    assert watch.ran == WHOLE


@torch.no_grad()
def test_fused_in_training_mode(original, watch, x):
    model = mk.fuse(copy.deepcopy(original).train())
    assert all(module.training for module in model.modules())
    assert_same(watch(model.eval(), x), expect(original, x))
    assert watch.ran == WHOLE


@torch.no_grad()
def test_an_asked_for_backend_and_autocast(original, model, watch, x):
    assert_same(watch(mk.fuse(original, backend="reference"), x), expect(original, x))
    assert watch.ran.together == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert watch(model, x).dtype == torch.bfloat16 and watch.ran.together == 0
    watch(mk.fuse(original, backend="cpu"), x)
    assert watch.ran == WHOLE


@torch.no_grad()
def test_copies_pickles_and_unfuse(original, model, watch, x):
    y = model(x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
        mk.fuse(model),
    )
    for other in copies:
        assert torch.equal(watch(other, x), y) and watch.ran == WHOLE
        PLACES["the stem"](other).weight.zero_()
        assert not torch.equal(other(x), y)
        assert torch.equal(model(x), y)
    plain = mk.unfuse(model)
    assert type(plain) is type(original) and vars(plain).keys() == vars(original).keys()
    assert [*map(type, plain.modules())] == [*map(type, original.modules())]
    assert torch.equal(plain(x), original(x))
    assert torch.equal(watch(model, x), y) and watch.ran == WHOLE
    assert model.state_dict().keys() == original.state_dict().keys()


@torch.no_grad()
def test_tracing_and_compiling(original, model, x):
    expected = expect(original, x)
    assert_same(torch.fx.symbolic_trace(model)(x), expected)
    assert_same(torch.jit.trace(model, x)(x), expected)
    assert_same(torch.export.export(model, (x,)).module()(x), expected)
    assert_same(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    parameters = dict(copy.deepcopy(model).named_parameters())
    name = next(iter(parameters))
    parameters[name] = 2 * parameters[name]
    changed = copy.deepcopy(original)
    next(changed.parameters()).mul_(2)
    assert_same(torch.func.functional_call(model, parameters, (x,)), expect(changed, x))
    assert_same(model(x), expected)


@torch.no_grad()
def test_same_bits_in_any_batch_and_at_any_number_of_threads(model, set_threads):
    x = torch.randn(19, 3, 64, 64)
    one_by_one = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    for count in (1, 2, 3):
        set_threads(count)
        for batch in (2, 9, 19):
            part = x[:batch]
            assert torch.equal(model(part), one_by_one[:batch])
        assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), one_by_one)


@torch.no_grad()
def test_images_that_do_not_fit(original, model):
    for x in (torch.randn(2, 4, 64, 64), torch.randn(3, 64), torch.randn(2, 3, 64, 64).double()):
        with pytest.raises(Exception) as expected:
            original(x)
        with pytest.raises(type(expected.value)):
            model(x)


def test_other_threads_go_on_while_a_model_is_read(original):
    served = ready(copy.deepcopy(original))
    image = torch.randn(1, 3, 32, 32)
    expected, failures, done = served(image), [], threading.Event()

    def serve():
        while not done.is_set():
            try:
                if not torch.equal(served(image), expected):
                    failures.append("another result")
            except Exception as error:
                failures.append(repr(error))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(3):
            mk.fuse(original)
            mk.plan(original, (3, 64, 64))
    finally:
        done.set()
        thread.join()
    assert not failures
