"""Plans: answers against float64, and the same bits everywhere."""

from collections import Counter

import cases
import pytest
import torch
from cases import why_wrong
from hypothesis import HealthCheck, assume, given, settings
from memory_layouts import layouts_of
from plan_cases import (
    NETWORKS,
    WIDTHS,
    chains,
    expect,
    features,
    image,
    network,
    settle,
    why_bits_differ,
)
from torch import nn

import mnv2_kernels as mk
from mnv2_kernels.network.program import Block, Linear, Pool, Stem

pytestmark = [
    pytest.mark.sampled(3),
    pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension"),
]

SIZES = {
    "ours-0.35": [(97, 131), (32, 32), (320, 64), (33, 320), (224, 224)],
    "ours-0.5": [(97, 131), (320, 320)],
    "ours-tf": [(192, 160), (224, 96)],
    "timm-0.5": [(127, 96)],
    "timm-tf-lite0": [(75, 98), (97, 66), (95, 95)],
    "flat": [(97, 66), (5, 4)],
    "torchvision-mnasnet": [(75, 98)],
    "timm-lite0": [(224, 224), (75, 130)],
    "timm-mobilenetv1": [(131, 97)],
    "block": [(1, 1), (2, 5), (131, 97)],
    "block-residual": [(1, 1), (1, 40), (131, 97)],
    "residuals": [(1, 1), (3, 2), (224, 131)],
    "features-3": [(1, 1), (35, 320)],
}
CALLS = [
    *[(name, size) for name in NETWORKS for size in [(96, 96), *SIZES.get(name, [])]],
    *[
        (f"ours-{w:g}", (n, n))
        for w in WIDTHS
        for n in (128, 160, 192, 224)
        if (w, n) != (0.35, 224)
    ],
]


@pytest.mark.parametrize(("name", "size"), CALLS, ids=str)
def test_answers(name, size):
    # A mean error of few numbers says little.
    images = 24 if name in ("ours-one-class", "mean-alone", "flat") else 2
    model, x = network(name), image(images, 3, *size)
    plan = mk.plan(model, x.shape)
    y = plan(x)
    expected = expect(model, x)
    assert (reason := why_wrong(y, expected)) is None, reason
    if y.dim() == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)
    fused = mk.plan(mk.fuse(model), x.shape[1:])
    assert torch.equal(fused(x), y)


def test_what_the_networks_cover():
    """Both ends of a clip are reached before, in and after the blocks; steps of every kind."""
    found = Counter()
    for name in NETWORKS:
        found += features(mk.plan(network(name), (3, 96, 96)))
    assert found["streams"] > 50 and found["overwrites"] > 20, found
    model = torch.nn.Sequential(*network("torchvision-0.75").features)
    clips = [m for m in model.modules() if isinstance(m, nn.ReLU6)]
    ends = []
    hooks = [
        clip.register_forward_hook(lambda _, x, y: ends.append((y == 0).any() & (y == 6).any()))
        for clip in clips
    ]
    with torch.no_grad():
        model(image(2, 3, 96, 96))
    for hook in hooks:
        hook.remove()
    assert len(ends) == len(clips) == 35 and all(ends)


IN_BITS = [
    ("ours-0.35", (97, 131)),
    ("ours-1", (64, 64)),
    ("features-8", (97, 33)),
    ("residuals", (97, 33)),
    ("residuals", (7, 5)),
    ("mean-alone", (40, 33)),
    ("block", (17, 40)),
    ("block-residual", (9, 40)),
    ("timm-lite0", (64, 75)),
    ("timm-mobilenetv1", (64, 64)),
]
in_bits = pytest.mark.parametrize(("name", "size"), IN_BITS, ids=str)


@pytest.mark.parametrize("name", ["timm-tf-lite0", "torchvision-mnasnet", "flat"])
def test_every_convolution_is_in_a_step(name):
    model = network(name)
    plan = mk.plan(model, (3, 96, 96))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    inside = [2 + s.layer.config.expansion for s in plan.steps if isinstance(s.layer, Block)]
    assert convolutions == sum(inside) + 2, "stem and last convolution"
    assert [type(step.layer) for step in plan.steps] == [Stem] + [Block] * len(inside) + [
        Pool,
        Linear,
    ]


@in_bits
def test_the_same_bits_at_any_threads_and_place(name, size, set_threads):
    x = image(8, 3, *size)
    plan = mk.plan(network(name), x.shape)
    assert why_bits_differ(plan, x, set_threads, (1, 2, 3, 5, 8), (1, 2, 3, 5)) is None


@in_bits
def test_the_same_bits_on_every_call(name, size, set_threads):
    x = image(3, 3, *size)
    plan = mk.plan(network(name), x.shape)
    for threads in (1, 3):
        set_threads(threads)
        first = plan(x)
        kept = first.clone()
        assert all(torch.equal(plan(x), first) for _ in range(10))
        assert torch.equal(first, kept), "a later call wrote to an earlier result"


@in_bits
def test_the_image_of_another_place_does_not_matter(name, size, set_threads):
    x = image(5, 3, *size)
    plan = mk.plan(network(name), x.shape)
    right = plan(x)
    x[2] = torch.nan
    for threads in (1, 2, 3):
        set_threads(threads)
        y = plan(x)
        assert torch.equal(y[[0, 1, 3, 4]], right[[0, 1, 3, 4]]) and y[2].isnan().any()


@in_bits
def test_what_fresh_memory_holds_does_not_matter(name, size, set_threads):
    x = image(3, 3, *size)
    plan = mk.plan(network(name), x.shape)
    right = plan(x)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for threads in (1, 2, 5):
            set_threads(threads)
            assert torch.equal(plan(x), right)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["features-3", "mean-alone", "block", "residuals"])
def test_any_layout_of_x(name, set_threads):
    x = image(3, 3, 10, 9)
    plan = mk.plan(network(name), x.shape)
    weights = {w.untyped_storage().data_ptr() for w in plan._program.weights if w is not None}
    wrong, count = [], 0
    for layout, other in layouts_of(x):
        before = other.clone(memory_format=torch.contiguous_format)
        right = plan(before.contiguous(memory_format=torch.channels_last))
        for threads in (1, 2):
            set_threads(threads)
            y = plan(other)
            place = y.untyped_storage().data_ptr()
            if not torch.equal(y, right):
                wrong.append(f"{layout}: other bits")
            if not torch.equal(other, before):
                wrong.append(f"{layout}: x was written to")
            if place == other.untyped_storage().data_ptr() or place in weights:
                wrong.append(f"{layout}: the result aliases an input")
        count += 1
    assert not wrong and count >= 70, wrong


def test_batches_of_none():
    for name, shape in (("ours-0.35", (0, 100)), ("features-8", (0, 64, 4, 4))):
        plan = mk.plan(network(name), (3, 64, 64))
        assert plan(torch.empty(0, 3, 64, 64)).shape == shape


def test_weights_are_those_of_the_moment():
    model = settle(mk.mobilenet_v2(0.35, 5), x := image(1, 3, 64, 64))
    plan = mk.plan(model, x.shape)
    before = plan(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(plan(x), before)
    assert why_wrong(mk.plan(model, x.shape)(x), expect(model, x)) is None


def test_a_model_in_training_and_its_dropouts():
    model = settle(mk.mobilenet_v2(0.35, 5, dropout=0.9), x := image(2, 3, 64, 64))
    right = mk.plan(model, x.shape)(x)
    plan = mk.plan(model.train(), x.shape)
    assert torch.equal(plan(x), right) and model.training
    assert [type(step.layer).__name__ for step in plan.steps[-2:]] == ["Pool", "Linear"]


@settings(
    max_examples=250 if cases.LONG else 100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(chain=chains())
def check_a_chain(covered, set_threads, chain):
    model, x = chain
    try:
        mk.plan(model, x.shape)
    except ValueError as error:
        assert "is too small for" in str(error), error
        assume(False)
    settle(model, x)
    plan = mk.plan(model, x.shape)
    covered += features(plan)
    covered["chains"] += 1
    with torch.no_grad():
        one_by_one = model(x)
    y = plan(x)
    # Far above rounding, far below a tap, a channel or a pixel too many or too few.
    largest = max(one_by_one.abs().max().item(), 1e-3)
    torch.testing.assert_close(y, one_by_one, rtol=0, atol=2e-5 * largest)
    assert why_bits_differ(plan, x, set_threads, (1, 2, 3), (1, 2, 3, 5)) is None, str(plan)


def test_random_chains(set_threads):
    covered = Counter()
    check_a_chain(covered, set_threads)
    for name in ("streams", "overwrites", "dilated", "asymmetric", "without expansion"):
        assert covered[name] >= 20, covered
    assert covered["chains"] >= 60 and covered["streams thrice"] >= 5, covered
