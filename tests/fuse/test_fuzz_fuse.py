"""Random networks through `fuse`: the blocks that must be fused are, and the answers stay.

The truth is the network before `fuse`, in float64; after every edit of the model as after the first
call. Failures ever found are examples of `check_network`.
"""

import re
from collections import Counter
from dataclasses import dataclass

import cases
import pytest
import torch
from cases import FLOOR, Expected, why_wrong
from fuzzing import at_least, in_parts, of_few, search, searched
from hypothesis import assume, example, given
from hypothesis import strategies as st
from model_edits import EDITS
from random_blocks import BESIDE, BLOCKS, CHAINS, RELATIVES, Piece
from random_calls import as_it_is, layouts, on_threads
from random_networks import (
    CHANGES,
    Network,
    are_expected,
    block_calls,
    build,
    expected,
    networks,
    settle,
)
from torch import Tensor, nn
from whole_networks import Watch

import mnv2_kernels as mk
from mnv2_kernels.profiling.variants import plain

pytestmark = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)


@dataclass(frozen=True)
class Image:
    batch: int
    height: int
    width: int


def blocks_run_fused(watch: Watch, original: nn.Module, model: nn.Module, x: Tensor) -> int:
    """How many depthwise convolutions of the original do not run as such in the fused model."""
    watch(plain(original), x)
    of_layers = watch.ran.depthwise
    watch(model, x)
    return of_layers - watch.ran.depthwise


def expect(model: nn.Module, x: Tensor) -> Expected:
    """What the layers give for x, in two layouts of it and in float64."""
    layers = plain(model)
    images = x.contiguous(), x.contiguous(memory_format=torch.channels_last)
    eager = [layers(image) for image in images]
    return expected(layers.double()(x.double()), eager, x.dtype)


def why_other(original: nn.Module, model: nn.Module, x: Tensor) -> str | None:
    """None where both give the same for x, or raise the same; otherwise what differs."""
    try:
        truth = expect(original, x)
        original(x)  # For what a call changes.
    except (ValueError, RuntimeError) as error:
        with pytest.raises(type(error)):
            model(x)
        return None
    y = model(x)
    finite = truth.truth.isfinite()
    if not torch.equal(y.isfinite(), finite):
        return f"not finite at {(~y.isfinite()).sum()} places, expected {(~finite).sum()}"
    if x.dtype == torch.float64 or not finite.all():
        near = torch.allclose(y.double(), truth.truth, equal_nan=True)
        return None if near else "other values"
    return why_wrong(y, of_few(truth))


def raises(model: nn.Module, x: Tensor) -> bool:
    try:
        model(x)
    except (ValueError, RuntimeError):
        return True
    return False


def drops_values(model: nn.Module) -> bool:
    names = ("Dropout", "DropPath")
    return any(m.training and type(m).__name__ in names for m in model.modules())


def step_in_training_mode(original: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Both leave the same statistics in their batch norms, or raise the same."""
    raised = []
    for each in (original, model):
        each.train()
        torch.manual_seed(7)
        try:
            each(x)
        except ValueError as error:
            raised.append(str(error))
        each.eval()
    assert len(set(raised)) == len(raised) / 2, raised
    before = original.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-4, equal_nan=True)


_BOUNDS = {nn.Hardswish: (-3, 3), nn.Hardsigmoid: (-3, 3), nn.LeakyReLU: (0,), nn.ReLU: (0,)}


@torch.no_grad()
def nearest_to_a_bound(model: nn.Module, x: Tensor) -> float:
    """How far the nearest value is from where the derivative of an activation jumps."""
    distances = [float("inf")]

    def look(module, args):
        bounds = _BOUNDS.get(type(module)) or (module.min_val, module.max_val)
        distances.extend((args[0] - bound).abs().min().item() for bound in bounds)

    for module in model.modules():
        if isinstance(module, (nn.Hardtanh, *_BOUNDS)):
            module.register_forward_pre_hook(look)
    model(x)
    return min(distances)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    found = torch.autograd.grad(y, [x, *named.values()], direction, allow_unused=True)
    return dict(zip(["x", *named], found, strict=True))


def why_other_gradients(original: nn.Module, model: nn.Module, x: Tensor) -> str | None:
    """None where the gradients are the layers'."""
    eager = gradients(plain(original), x)
    truth = gradients(plain(original).double(), x.double())
    found = gradients(model, x)
    for name, exact in truth.items():
        if exact is None:
            if found[name] is not None:
                return f"{name} has a gradient"
            continue
        largest = exact.abs().max().item()
        allowed = 2 * (eager[name] - exact).abs().max().item() + 1e-4 * largest + 1e-6
        error = (found[name] - exact).abs().max().item()
        if not error <= allowed:
            return f"gradient of {name}: error {error:.1e}, allowed {allowed:.1e}"
    return None


def act(kind: str, original: nn.Module, model: nn.Module, x: Tensor) -> str | None:
    """Do something else than infer with both models; what differs, or None."""
    if not len(x) or drops_values(original):
        return None
    if kind == "train":
        step_in_training_mode(original, model, x)
        return why_other(original, model, x)
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y, eager = model(x), plain(original)(x)
        # What torchvision's newer blocks add in place, they alone round to 16 bits; and its frozen
        # norms are in float32, whatever comes before them.
        if y.dtype not in (eager.dtype, x.dtype, torch.bfloat16):
            return f"{y.dtype} in autocast, not {eager.dtype}"
        truth = plain(original).double()(x.double())
        error, eager_error = ((z.double() - truth).abs().max() for z in (y, eager))
        allowed = 2 * eager_error + FLOOR * torch.finfo(torch.bfloat16).eps * truth.abs().max()
        return None if error <= allowed else f"autocast: error {error:.1e}, allowed {allowed:.1e}"
    return None


def found(*pieces: Piece, **settings):
    """A network that went wrong once, as an example."""
    nothing = {"threads": 1, "frozen": False, "verify": False, "action": "", "edits": []}
    network = Network(0, 4, pieces, **settings)
    return example(network=network, image=Image(2, 7, 6), layout=as_it_is, **nothing)


# A block inside a child, followed by what belongs to no block, was not fused.
@found(
    Piece("pointwise", 6),
    Piece("layers", 6),
    Piece("identity", 6),
    Piece("stem", 5),
    nesting="halves",
)
# A declined block between fused ones was not told of once they were fused.
@found(Piece("layers", 4, change=("act", "leaky", 0)), Piece("layers", 6), Piece("pair", 5))
@searched(160, 600)
@given(
    network=networks(),
    image=st.builds(Image, st.integers(0, 3), st.integers(1, 22), st.integers(1, 22)),
    layout=layouts(),
    threads=st.sampled_from((1, 1, 1, 2)),
    frozen=st.integers(0, 4).map(lambda n: n == 0),
    verify=st.integers(0, 7).map(lambda n: n == 0),
    action=st.sampled_from(("", "", "train", "gradients", "autocast")),
    edits=st.lists(st.tuples(st.sampled_from(sorted(EDITS)), st.integers(0, 60)), max_size=3),
)
def check_network(covered, watch, network, image, layout, threads, frozen, verify, action, edits):
    size = network.channels, image.height, image.width
    dtype = getattr(torch, network.dtype)
    try:
        original = settle(build(network), torch.randn(4, *size)).to(dtype)
    except (ValueError, RuntimeError) as error:
        # A norm that needs more values of a channel, an image too small to be reflected or for a
        # kernel whose padding is made for another size.
        known = "Expected more than 1|Padding size should be less|Kernel size can't be greater"
        assert re.search(known, str(error)), error
        assume(False)
    if frozen and "batch statistics" not in str(network):
        original = mk.freeze_bn(original)
    model = mk.fuse(original, verify=verify)
    states = Counter(row.state for row in mk.explain(model))
    # Which pieces are blocks is the matter of `test_every_change_of_every_family`.
    assert not states["fusable"], mk.explain(model)
    assert list(model.state_dict()) == list(original.state_dict())
    x = layout(torch.randn(image.batch, *size).to(dtype))
    with on_threads(threads), torch.no_grad():
        reason = why_other(original, model, x)
        assert reason is None, reason
        if raises(original, x):
            return
        if len(x):
            least, most = block_calls(network)
            count = blocks_run_fused(watch, original, model, x)
            assert least <= count <= most, f"{count} blocks ran fused, not {least} to {most}"
        plainly = mk.unfuse(model)
        assert torch.equal(plainly(x), original(x))
    if frozen:
        original.train(), model.train()
    with on_threads(threads):
        check_gradients(covered, action, network, original, model, x)
        with torch.no_grad():
            reason = act(action, original, model, x)
            assert reason is None, reason
            for name, which in edits:
                original, model = EDITS[name]([original, model], which)
                x = x.to(next(original.parameters()).dtype)
                if drops_values(original):
                    continue
                reason = why_other(original, model, x)
                assert reason is None, f"{name}: {reason}"
                covered[name] += 1
    covered.update({piece.kind: 1 for piece in network.pieces})
    covered.update({"cases": 1, "frozen": frozen, "verified": verify, network.dtype: 1})
    covered.update({"blocks " + state: count for state, count in states.items()})


def check_gradients(covered, action, network, original, model, x) -> None:
    if action != "gradients" or x.dtype != torch.float32 or not len(x) or drops_values(original):
        return
    if "max-pool" in str(network) or "instance" in str(network):
        # A max pool's derivative jumps where two values are nearly the same. An instance norm's, of
        # two pixels, is rounding alone, and differs between layouts of a gradient.
        return
    near = nearest_to_a_bound(plain(original).double(), x.double())
    if near < 2e-5:
        return
    reason = why_other_gradients(original, model, x)
    assert reason is None, f"{reason}; {near:.1e} from a bound"
    covered["gradients"] += 1


@torch.no_grad()
def test_every_change_of_every_family():
    """What a search may not come to: each family as it is and with each of its layers changed."""
    wrong, count = {}, 0
    for kind in (*BLOCKS, *CHAINS, *RELATIVES):
        for change in (None, *CHANGES) if kind not in RELATIVES else (None,):
            piece = Piece(kind, 4, change=change and (*change, count % 3))
            network = Network(count, 4, (piece,))
            original = settle(build(network), torch.randn(4, 4, 7, 6))
            model = mk.fuse(original)
            states = Counter(row.state for row in mk.explain(model))
            reason = why_other(original, model, torch.randn(2, 4, 7, 6))
            if not are_expected(states, network) or reason is not None:
                wrong[str(piece)] = states, reason
            count += 1
    assert not wrong and count >= 350, wrong


EDITED = (
    Network(1, 4, (Piece("stem", 6), Piece("layers", 6), Piece("pair", 5)), form="module"),
    Network(2, 4, (Piece("flat", 4), Piece("timm", 6), Piece("pointwise", 5)), nesting="each"),
    Network(3, 4, (Piece("own", 4), Piece("torchvision", 4), Piece("kuangliu", 4)), nesting="deep"),
)


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_every_edit(edit):
    """Of any layer: each number is another one of them."""
    wrong, images = {}, torch.randn(4, 4, 9, 7)
    for number, network in enumerate(EDITED):
        for which in range(0, 30, 4 if number else 2):
            original = settle(build(network), images)
            model = mk.fuse(original)
            model(images[:2])
            original, model = EDITS[edit]([original, model], which)
            x = images[:2].to(next(original.parameters()).dtype)
            reason = why_other(original, model, x)
            if reason is not None:
                wrong[number, which] = reason
    assert not wrong


@in_parts(20)
def test_random_networks(watch, part):
    covered = search(check_network, part, watch)
    seen = [n for n in (*BLOCKS, *CHAINS, *RELATIVES, *BESIDE, *EDITS) if covered[n]]
    assert len(seen) >= at_least(40), covered
    for name in ("frozen", "verified", "gradients", "bfloat16", "blocks declined"):
        assert covered[name] >= at_least(1), covered
    assert covered["blocks fused"] >= at_least(covered["cases"]), covered
    assert covered["cases"] >= 130, covered
