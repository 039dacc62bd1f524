"""Models that are more than their layers: before and after `fuse` they answer as they did.

What is declined, and the sentence for it, is in test_declined.py; what an ordinary life does to a
fused module in test_modules.py.
"""

import copy
from functools import partial

import pytest
import torch
from answers import answers, assert_same, block, image
from same_answers import randomise
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

pytestmark = [pytest.mark.sampled(2), pytest.mark.usefixtures("one_thread")]

FIRST, NORM, CLIP = "conv.0.0", "conv.0.1", "conv.0.2"


def own(kind: type[nn.Module] = mk.InvertedResidual) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind(8, 8)).eval()


class DoubledCall:
    """First base of a class whose forward is not all that a call does."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class DoubledForward:
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledPlainForward:
    def plain_forward(self, x):
        return 2 * super().plain_forward(x)


def of(first: type, kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"{first.__name__}{kind.__name__}", (first, kind), {})


class ReplacedCall(TorchvisionBlock):
    def _call_impl(self, x):
        return 2 * super()._call_impl(x)

    __call__ = _call_impl


def with_layer(name: str, make) -> nn.Module:
    """A block one of whose layers is another, with the same weights."""
    model = block()
    layer = make()
    layer.load_state_dict(model.get_submodule(name).state_dict())
    model.set_submodule(name, layer.eval())
    return model


def sequential_called() -> nn.Module:
    model = block()
    model.conv.__class__ = of(DoubledCall, nn.Sequential)
    return model


class Twice(nn.Module):
    """One block under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = block()

    def forward(self, x):
        return self.second(self.first(x))


class Delegates(nn.Module):
    """Has every attribute of what is inside it."""

    def __init__(self):
        super().__init__()
        self.inner = block()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.other(name)

    def other(self, name):
        return getattr(self.inner, name)

    def forward(self, x):
        return self.inner(x)


class HasEverything(Delegates):
    def other(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return True


class HasNothing(Delegates):
    def other(self, name):
        raise AttributeError(name) if name.startswith("__") else ValueError(name)


class Empty(TorchvisionBlock):
    """False in a condition."""

    def __len__(self):
        return 0


def shared_weights() -> nn.Module:
    first, second = block(), block()
    second.conv[0][0].weight = first.conv[0][0].weight
    return nn.Sequential(first, second)


def nested(depth: int) -> nn.Module:
    model = block()
    for _ in range(depth):
        model = nn.Sequential(model)
    return model


# How to build a model, and how many of its blocks are to be fused.
MODELS = {
    # The layers inside are a block too.
    "call of the block": (lambda: block(of(DoubledCall, TorchvisionBlock)), 1),
    "call of the block replaced": (lambda: block(ReplacedCall), 1),
    # What follows the expansion is a block without one.
    "call of a convolution": (
        lambda: with_layer(FIRST, partial(of(DoubledCall, nn.Conv2d), 8, 48, 1, bias=False)),
        1,
    ),
    "call of a norm": (
        lambda: with_layer(NORM, partial(of(DoubledCall, nn.BatchNorm2d), 48)),
        1,
    ),
    "call of an activation": (lambda: with_layer(CLIP, of(DoubledCall, nn.ReLU6)), 1),
    "call of a Sequential": (sequential_called, 0),
    "call of a chain": (lambda: of(DoubledCall, nn.Sequential)(block(), block()), 2),
    "used twice": (Twice, 1),
    "weights shared": (shared_weights, 2),
    "scripted child": (
        lambda: nn.Sequential(block(), torch.jit.script(nn.Conv2d(8, 8, 1)), block()),
        2,
    ),
    "traced block": (lambda: nn.Sequential(torch.jit.trace(block(), image()), block()), 1),
    "scripted model": (lambda: torch.jit.script(block()), 0),
    "attributes of another": (Delegates, 1),
    "every attribute": (HasEverything, 1),
    "errors for attributes": (HasNothing, 1),
    "empty": (lambda: nn.Sequential(block(Empty), block()), 2),
    "nested": (lambda: nested(50), 1),
    "own, forward": (lambda: nn.Sequential(own(of(DoubledForward, mk.InvertedResidual)), own()), 2),
    "own, call": (lambda: nn.Sequential(own(), own(of(DoubledCall, mk.InvertedResidual))), 1),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_answers_stay(name):
    build, fused_blocks = MODELS[name]
    model = build()
    truth = answers(model)
    before = list(model.state_dict())
    fused = mk.fuse(model)
    assert_same(fused, truth, "fused")
    assert sum(row.state == "fused" for row in mk.explain(fused)) == fused_blocks
    assert list(fused.state_dict()) == before
    assert torch.equal(answers(mk.unfuse(fused)), truth) or name.startswith("own")
    assert torch.equal(answers(model), truth), "the original has changed"
    assert_same(copy.deepcopy(fused), truth, "copy")
    assert_same(mk.fuse(fused), truth, "fused twice")


@pytest.mark.parametrize("first", [DoubledForward, DoubledPlainForward, DoubledCall])
def test_own_blocks_with_something_around_them(first):
    """In a chain, alone and in a plan: the subclass counts at every place."""
    plain = own()
    y = answers(plain)
    model = own(of(first, mk.InvertedResidual))
    truth = 2 * y
    assert_same(model, truth, "alone")
    for blocks in ((model,), (model, nn.Identity())):
        assert_same(mk.fuse(nn.Sequential(*blocks)), truth, "in a chain")
    pairs = nn.Sequential(own(), model), nn.Sequential(model, own())
    for pair, right in zip(pairs, (2 * answers(plain, y), answers(plain, truth)), strict=True):
        assert_same(mk.fuse(pair), right, "beside another")
        which = rf"[01] \({first.__name__}InvertedResidual\)"
        with pytest.raises(ValueError, match=f"^plan: .* as a plan: .*{which}"):
            mk.plan(pair, (8, 9, 7))


def to_plain_tensor(layer: nn.Module, name: str) -> None:
    tensor = getattr(layer, name).detach()
    delattr(layer, name)
    setattr(layer, name, 1.5 * tensor)


def to_buffer(layer: nn.Module, name: str) -> None:
    tensor = getattr(layer, name).detach()
    delattr(layer, name)
    layer.register_buffer(name, 1.5 * tensor)


def doubled(layer: nn.Module, method: str) -> None:
    known = getattr(layer, method)
    setattr(layer, method, lambda *args: 2 * known(*args))


def pruned(model: nn.Module, remove: bool) -> None:
    layer = model.get_submodule(FIRST)
    prune.l1_unstructured(layer, "weight", 0.5)
    if remove:
        prune.remove(layer, "weight")


def seeded(change):
    def changed(model: nn.Module) -> None:
        torch.manual_seed(5)
        change(model.get_submodule(FIRST))
        model.eval()

    return changed


def removed_weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    parametrize.remove_parametrizations(layer, "weight")


def add_bias(layer: nn.Module) -> None:
    layer.bias = nn.Parameter(torch.randn(48))


def hooked(register: str, hook):
    return lambda model: getattr(model.get_submodule(FIRST), register)(hook)


CHANGES = {
    "weight a plain tensor": lambda m: to_plain_tensor(m.get_submodule(FIRST), "weight"),
    "weight a buffer": lambda m: to_buffer(m.get_submodule(FIRST), "weight"),
    "mean a plain tensor": lambda m: to_plain_tensor(m.get_submodule(NORM), "running_mean"),
    "gamma a plain tensor": lambda m: to_plain_tensor(m.get_submodule(NORM), "weight"),
    "gamma missing": lambda m: setattr(m.get_submodule(NORM), "weight", None),
    "bias added": seeded(add_bias),
    "pruned": lambda m: pruned(m, False),
    "pruned for good": lambda m: pruned(m, True),
    "spectral norm, old": seeded(nn.utils.spectral_norm),
    "spectral norm": seeded(parametrizations.spectral_norm),
    "weight norm, old": seeded(lambda layer: (nn.utils.weight_norm(layer), add_bias(layer))),
    "weight norm": seeded(lambda layer: (parametrizations.weight_norm(layer), add_bias(layer))),
    "weight norm removed": seeded(lambda layer: (removed_weight_norm(layer), add_bias(layer))),
    "forward of the block": lambda m: doubled(m, "forward"),
    "forward of a convolution": lambda m: doubled(m.get_submodule(FIRST), "forward"),
    "inner forward of a convolution": lambda m: doubled(m.get_submodule(FIRST), "_conv_forward"),
    "forward of a norm": lambda m: doubled(m.get_submodule(NORM), "forward"),
    "forward of an activation": lambda m: doubled(m.get_submodule(CLIP), "forward"),
    "forward of a Sequential": lambda m: doubled(m.conv, "forward"),
    "class of a convolution": lambda m: setattr(
        m.get_submodule(FIRST), "__class__", of(DoubledForward, nn.Conv2d)
    ),
    "class of a norm": lambda m: setattr(
        m.get_submodule(NORM), "__class__", of(DoubledForward, nn.BatchNorm2d)
    ),
    "class of an activation": lambda m: setattr(
        m.get_submodule(CLIP), "__class__", of(DoubledForward, nn.ReLU6)
    ),
    "activation": lambda m: m.set_submodule(CLIP, nn.Hardtanh(0.0, 0.5)),
    "bound of a clip": lambda m: setattr(m.get_submodule(CLIP), "max_val", 1.0),
    "eps": lambda m: setattr(m.get_submodule(NORM), "eps", 0.5),
    "forward hook": hooked("register_forward_hook", lambda m, args, y: 2 * y),
    "forward pre-hook": hooked("register_forward_pre_hook", lambda m, args: (2 * args[0],)),
    "layer appended": lambda m: m.conv.append(nn.Hardtanh()),
    "layer removed": lambda m: m.conv[0].pop(2),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.")
@pytest.mark.parametrize("chained", [False, True], ids=["alone", "in a chain"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_fusing(name, chained):
    """The change has an effect, and the same one as on the original; copies have it too."""
    model = nn.Sequential(block(), block()) if chained else block()
    fused = mk.fuse(model)
    before = answers(model)
    assert_same(fused, before, "before the change")
    for changed in (model, fused):
        CHANGES[name](changed[0] if chained else changed)
    truth = answers(model)
    assert (truth - before).abs().max() > 1e-3, "the change has no effect"
    assert_same(fused, truth, "after the change")
    if name != "forward of the block":  # That of the fused one goes with it.
        assert_same(mk.unfuse(fused, inplace=True), truth, "unfused")


HOOKS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_backward_hook",
    "register_state_dict_pre_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("where", ["", "conv", FIRST, NORM, CLIP])
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_every_kind(register, where):
    """Called as often as without fusing, by a call, its backward pass and load_state_dict."""
    counts = []
    for make in (lambda model: model, mk.fuse):
        model, called = make(block()), []
        for layer in model.modules():
            if isinstance(layer, nn.ReLU6):
                layer.inplace = False  # Such hooks refuse what is changed in place.
        getattr(model.get_submodule(where), register)(lambda *args, c=called: c.append(1))
        x = image().requires_grad_()
        model(x).sum().backward()
        model.load_state_dict(model.state_dict())
        counts.append(len(called))
    assert counts[0] == counts[1] >= 1
