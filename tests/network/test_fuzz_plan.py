"""Random networks through `plan`: the answers of the layers in float64, the same bits everywhere,
or a refusal where there has to be one.

Chains with stems of any padding and tensors that overwrite one another: test_plan.py.
"""

from dataclasses import replace

import cases
import pytest
import torch
from cases import Expected, why_wrong
from fuzzing import at_least, in_parts, of_few, search, searched
from hypothesis import assume, example, given
from hypothesis import strategies as st
from plan_cases import why_bits_differ
from random_blocks import BLOCKS, CHAINS, HARMLESS, RELATIVES, SPOILING, Piece, is_spoiled
from random_calls import as_it_is, layouts
from random_networks import Network, build, expected, keeps_shape, networks, settle
from torch import Tensor, nn

import mnv2_kernels as mk
from mnv2_kernels.profiling.variants import plain

pytestmark = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)

POINTWISE = ("pointwise", "pointwise-linear", "pointwise-bias", "pointwise-hardswish")
KINDS = (*BLOCKS, *CHAINS) * 3 + (*POINTWISE, "identity", "dropout") * 2
# Rarely one that no plan has a step for.
REFUSED = (
    *sorted(RELATIVES.keys() - {"kuangliu"}),
    "dense",
    "max-pool",
    "average-pool",
    "upsample",
    "pointwise-mish",
)
CHANGES = [(kind, into) for kind in HARMLESS for into in HARMLESS[kind]] * 4 + [
    (kind, into) for kind in SPOILING for into in SPOILING[kind]
]


def has_plan(network: Network) -> bool | None:
    """Whether a plan must be made of the network, or refused; None where both are right."""
    pieces = network.pieces
    refused = any(p.kind in REFUSED or is_spoiled(p) for p in pieces)
    if refused or (network.form == "residual" and keeps_shape(network)):
        return False
    # A layer that does nothing ends a stage of a chain; a slice is a module without a name.
    loose = any(p.kind in CHAINS and p.change and p.change[1] == "none" for p in pieces)
    inside = any(p.kind in BLOCKS or p.kind in CHAINS for p in pieces)
    stems = any(p.kind == "stem" for p in pieces[1:])
    loose = loose or any(p.kind == "kuangliu" for p in pieces)
    return None if loose or stems or not inside or network.form == "sliced" else True


@torch.no_grad()
def expect(model: nn.Module, x: Tensor, dtype: torch.dtype, averages: bool) -> Expected:
    """The truth for x in a dtype, of the weights before they are rounded to it.

    A plan sums an average in float32 by 32 pixels, PyTorch in halves: errors of the one grow with
    the number of sums, of the other with its logarithm.
    """
    layers = plain(model)
    truth = layers.double()(x.double())
    judged = expected(truth, [plain(model).to(dtype)(x)], dtype)
    pixels = x.shape[2] * x.shape[3] if averages else 0
    more = pixels / 512 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    return replace(
        judged, eager_max=judged.eager_max + more, eager_mean=judged.eager_mean + more / 2
    )


@st.composite
def chains(draw) -> Network:
    kinds = KINDS if draw(st.integers(0, 4)) else KINDS + REFUSED * 3
    network = draw(networks(kinds, CHANGES, dtypes=("float32",)))
    if draw(st.booleans()):
        first = network.pieces[0]
        stem = replace(first, kind="stem", channels=network.channels, change=None)
        network = replace(network, pieces=(stem, *network.pieces))
    return network


# An owned arena had no room for the weights of a 1x1 convolution in 16 bits.
@example(
    network=Network(0, 2, (Piece("stem", 2), Piece("pointwise-bias", 2))),
    size=(12, 14),
    dtype=torch.float16,
    layout=as_it_is,
)
@searched(90, 330)
@given(
    network=chains(),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from((torch.float32,) * 4 + (torch.bfloat16, torch.float16)),
    layout=layouts(),
)
def check_plan(covered, set_threads, network, size, dtype, layout):
    shape = network.channels, *size
    try:
        model = settle(build(network), torch.randn(4, *shape))
    except (ValueError, RuntimeError):  # Too small an image for a norm or a reflection.
        assume(False)
    x = layout(torch.randn(3, *shape).to(dtype))
    must = has_plan(network)
    covered["cases"] += 1
    try:
        plan = mk.plan(model, shape, dtype=dtype)
    except ValueError as error:
        assert "cannot be run as a plan" in str(error), error
        assert must is not True, error
        covered["refused"] += 1
        return
    assert must is not False, str(plan)
    y = plan(x)
    reason = why_wrong(y, of_few(expect(model, x, dtype, network.head != "none")))
    assert reason is None, f"{reason}\n{plan}"
    assert why_bits_differ(plan, x, set_threads, (1, 3), (1, 2, 3)) is None, str(plan)
    owning = mk.plan(model, shape, dtype=dtype, own_arena=True)
    assert torch.equal(owning(x), y) and torch.equal(owning(x[1:]), y[1:])
    assert torch.equal(mk.plan(mk.fuse(model), shape, dtype=dtype)(x), y)
    covered.update({"planned": 1, str(dtype): 1, "steps": len(plan.steps)})
    covered["streams"] += sum(step.streams for step in plan.steps)


@in_parts(10)
def test_random_plans(set_threads, part):
    covered = search(check_plan, part, set_threads)
    assert covered["planned"] >= at_least(covered["cases"] // 4), covered
    assert min(covered["streams"], covered["refused"]) >= at_least(8), covered
    assert covered["steps"] >= at_least(3 * covered["planned"]), covered
    assert min(covered[str(dtype)] for dtype in cases.DTYPES) >= at_least(3), covered
