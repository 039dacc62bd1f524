"""Random calls of the op, forward and backward, against the float64 reference."""

from dataclasses import replace
from math import inf, nan

import cases
import pytest
import torch
from cases import Case
from exact_gradients import found_gradients, make_call, true_gradients, wrong
from fuzzing import at_least, in_parts, search, searched
from hypothesis import given
from hypothesis import strategies as st
from random_calls import CHANNELS, SIZES, calls, layouts, on_threads
from rounding import why_not_rounded_once
from special_values import skipping_reference
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6
from mnv2_kernels.ops import reference

# (channels, sizes): now and then many channels of small images, or large images of few channels.
EXTENTS = (
    *[(CHANNELS, SIZES)] * 18,
    (st.sampled_from((200, 320, 385, 576, 961)), st.integers(1, 6)),
    (st.integers(1, 20), st.integers(40, 97)),
)
# A sum of integers is exact in any order only while all of them are integers.
WHOLE_CLIPS = st.sampled_from((NO_CLIP, RELU, RELU6, (-3.0, 4.0), (-1.0, 2.0)))


def rearranged(weights: FoldedWeights, place) -> FoldedWeights:
    names = ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")
    present = {n: t for n in names if (t := getattr(weights, n)) is not None}
    return replace(weights, **{name: place(tensor) for name, tensor in present.items()})


def require_gradients(x: Tensor, weights: FoldedWeights, which: int) -> int:
    """Asks for gradients of the tensors whose bit is set; how many of them there are."""
    tensors = [x, *weights.tensors()]
    asked = [t for i, t in enumerate(tensors) if t is not None and which >> i & 1]
    for tensor in asked:
        tensor.requires_grad_()
    return len(asked)


def assert_near(y: Tensor, truth: Tensor, case: Case) -> None:
    """Wide enough for rounding under any clips (the other tests judge that), and far below what a
    tap, a channel or a pixel too many or too few would make.
    """
    torch.testing.assert_close(
        y.detach().double(), truth, rtol=1e-4, atol=1e-4, msg=lambda m: f"{case}: {m}"
    )


@searched(800, 800)
@given(
    case=calls(extents=EXTENTS),
    layout=layouts(),
    of_weights=st.one_of(st.none(), layouts()),
    gradients=st.one_of(st.just(0), st.integers(0, 127)),
    threads=st.sampled_from((1, 1, 1, 2, 3)),
)
def check_call(covered, backend, case, layout, of_weights, gradients, threads):
    x, weights = cases.make_inputs(case)
    x, given_weights = layout(x), weights if of_weights is None else rearranged(weights, of_weights)
    asked = require_gradients(x, given_weights, gradients)
    with on_threads(threads):
        y = cases.run(backend, x, given_weights, **case.settings)
    assert y.requires_grad == (asked > 0), f"{case}: {asked} tensors require gradients"
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = weights.to(torch.float64)
    with torch.no_grad():
        assert_near(y, reference.inverted_residual(x.double(), exact, **case.settings), case)
    config = case.config
    covered.update(
        {
            "cases": 1,
            "residual": config.residual,
            "many channels": max(config.in_channels, config.hidden_channels) >= 320,
            "large": case.width >= 40,
            "strided weights": of_weights is not None,
            "gradients": asked > 0,
            "threads": threads > 1,
        }
    )


@in_parts(20)
def test_random_calls(kernel_backend, part):
    covered = search(check_call, part, kernel_backend)
    few = [name for name in covered if covered[name] < at_least(8)]
    assert len(covered) == 7 and not few, covered


@searched(250, 750)
@given(case=calls(extents=EXTENTS), layout=layouts())
def check_call_in_16_bits(covered, backend, dtype, case, layout):
    x, weights = cases.make_inputs(case, dtype)
    expected = cases.expect(case, x, weights)
    y = cases.run(backend, layout(x), weights, **case.settings)
    reason = cases.why_wrong(y, expected) or why_not_rounded_once(y, expected, case, x, weights)
    assert reason is None, f"{case}: {reason}"
    covered["cases"] += 1


@in_parts(2)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_random_calls_in_16_bits(kernel_backend, dtype, part):
    covered = search(check_call_in_16_bits, part, kernel_backend, dtype)
    assert covered["cases"] >= 200, covered


@st.composite
def sprinklings(draw) -> list[tuple[int, int, float]]:
    """(which tensor, which element of it, what to put there); numbers beyond the last go round."""
    values = (nan, nan, inf, -inf, -0.0, 1e-42)
    one = st.tuples(st.integers(0, 6), st.integers(0, 2**20), st.sampled_from(values))
    return draw(st.lists(one, min_size=1, max_size=4))


@searched(200, 500)
@given(case=calls(channels=st.integers(1, 40), least_batch=1), places=sprinklings())
def check_special_values(covered, backend, case, places):
    x, weights = cases.make_inputs(case)
    tensors = [t for t in (x, *weights.tensors()) if t is not None]
    for which, where, value in places:
        tensor = tensors[which % len(tensors)].view(-1)
        tensor[where % len(tensor)] = value
    y = cases.run(backend, x, weights, **case.settings)
    truth = skipping_reference(x, weights, case)
    for kind in ("isnan", "isposinf", "isneginf"):
        found, expected = getattr(torch, kind)(y), getattr(torch, kind)(truth)
        assert torch.equal(found, expected), f"{case}: {kind} differs at {(found ^ expected).sum()}"
    finite = truth.isfinite()
    assert_near(y.where(finite, 0), truth.where(finite, 0), case)
    spread = bool(finite.any()) and not finite.all()
    covered.update({"cases": 1, "partly": spread, "nan": bool(truth.isnan().any())})


@in_parts(2)
def test_random_special_values(kernel_backend, part):
    covered = search(check_special_values, part, kernel_backend)
    assert min(covered["partly"], covered["nan"]) >= at_least(40), covered


@searched(200, 500)
@given(
    case=calls(channels=st.integers(1, 40), sizes=st.integers(1, 14), clips=WHOLE_CLIPS),
    layout=layouts(),
    of_gradient=layouts(),
    needed=st.integers(1, 127),
    threads=st.sampled_from((1, 1, 2, 3)),
)
def check_gradients(covered, case, layout, of_gradient, needed, threads):
    tensors, settings, grad_y = make_call(case)
    needs = [t is not None and bool(needed >> i & 1) for i, t in enumerate(tensors)]
    truth = true_gradients(tensors, settings, grad_y)
    truth = [t if need else None for t, need in zip(truth, needs, strict=True)]
    strided = [t if t is None else layout(t) for t in tensors]
    with on_threads(threads):
        found = found_gradients(strided, settings, of_gradient(grad_y), needs)
    assert wrong(found, truth) == [], case
    nonzero = any(g is not None and bool(g.any()) for g in truth)
    covered.update({"cases": 1, "nonzero": nonzero})


@pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension")
@in_parts(2)
def test_random_gradients(part):
    covered = search(check_gradients, part)
    assert covered["nonzero"] >= at_least(covered["cases"] // 3), covered
    assert covered["cases"] >= 150, covered
