"""Random calls of the op against the float64 reference: shapes, strides, offsets, clips."""

from functools import partial

import cases
import pytest
import torch
from cases import Case
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rounding import why_not_rounded_once

from mnv2_kernels import reference
from mnv2_kernels.block import NO_CLIP, RELU, RELU6, BlockConfig

CHANNELS = st.one_of(st.integers(1, 40), st.sampled_from((48, 64, 80, 96, 144, 208)))
SIZES = st.integers(1, 23)
CLIPS = st.one_of(
    st.sampled_from((NO_CLIP, RELU, RELU6)),
    st.tuples(st.floats(-2, 0, width=32), st.floats(0, 3, width=32)),
)


@st.composite
def calls(draw, channels=CHANNELS, sizes=SIZES, least_batch: int = 0) -> Case:
    kernel, dilation = draw(st.sampled_from((3, 5))), draw(st.sampled_from((1, 2)))
    expansion = draw(st.booleans())
    in_channels = draw(channels)
    extent = dilation * (kernel - 1)
    config = BlockConfig(
        in_channels=in_channels,
        hidden_channels=draw(channels) if expansion else in_channels,
        out_channels=draw(channels),
        stride=draw(st.sampled_from((1, 2))),
        expansion=expansion,
        kernel_size=kernel,
        dilation=dilation,
        padding=draw(st.tuples(*[st.integers(0, extent)] * 4)),
    )
    height, width = draw(sizes), draw(sizes)
    assume(min(config.output_hw(height, width)) >= 1)
    return Case(
        config,
        height,
        width,
        batch=draw(st.integers(least_batch, 3)),
        clips=draw(st.tuples(CLIPS, CLIPS, CLIPS)),
        biases=draw(st.tuples(*[st.booleans()] * 3)),
    )


@st.composite
def layouts(draw):
    """Puts a tensor into storage of another order, with gaps and an offset."""
    order = draw(st.permutations(range(4)))
    gaps = draw(st.tuples(*[st.integers(1, 2)] * 4))
    offset = draw(st.integers(0, 7))

    def place(x: torch.Tensor) -> torch.Tensor:
        sizes = [x.shape[i] * gaps[i] for i in order]
        storage = torch.full([offset + torch.Size(sizes).numel()], torch.nan, dtype=x.dtype)
        strided = storage[offset:].view(sizes)[tuple(slice(None, None, gaps[i]) for i in order)]
        placed = strided.permute([order.index(i) for i in range(4)])
        return placed.copy_(x)

    return place


repeatable = partial(
    settings,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@repeatable(max_examples=2000)
@given(case=calls(), layout=layouts())
def test_random_calls(kernel_backend, case, layout):
    x, weights = cases.make_inputs(case)
    x = layout(x)
    y = cases.run(kernel_backend, x, weights, **case.settings)
    exact = weights.to(torch.float64)
    truth = reference.inverted_residual(x.double(), exact, **case.settings)
    # Wide enough for rounding under any clips (the other tests judge that), and far below what a
    # tap, a channel or a pixel too many or too few would make.
    torch.testing.assert_close(
        y.double(), truth, rtol=1e-4, atol=1e-4, msg=lambda m: f"{case}: {m}"
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@repeatable(max_examples=250)
@given(case=calls(), layout=layouts())
def test_random_calls_in_16_bits(kernel_backend, dtype, case, layout):
    x, weights = cases.make_inputs(case, dtype)
    expected = cases.expect(case, x, weights)
    y = cases.run(kernel_backend, layout(x), weights, **case.settings)
    reason = cases.why_wrong(y, expected) or why_not_rounded_once(y, expected, case, x, weights)
    assert reason is None, f"{case}: {reason}"
