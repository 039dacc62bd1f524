"""Random calls of the op and random layouts of their tensors, for hypothesis."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from cases import Case
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig

CHANNELS = st.one_of(st.integers(1, 40), st.sampled_from((48, 64, 80, 96, 144, 208)))


SIZES = st.integers(1, 23)


CLIPS = st.one_of(
    st.sampled_from((NO_CLIP, RELU, RELU6)),
    st.tuples(
        # Between bounds that are nearly equal, the least error of a sum is as large as a result.
        st.one_of(st.just(0.0), st.floats(-2, -1 / 64, width=32)),
        st.one_of(st.just(0.0), st.floats(1 / 64, 3, width=32)),
    ),
)


@st.composite
def calls(
    draw, channels=CHANNELS, sizes=SIZES, least_batch: int = 0, clips=CLIPS, extents=None
) -> Case:
    if extents is not None:
        channels, sizes = draw(st.sampled_from(extents))
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
    if config.stride == 1 and draw(st.booleans()):
        before, beside = config.padding[:2]
        padding = before, beside, extent - before, extent - beside
        config = replace(config, out_channels=in_channels, padding=padding, residual=True)
    height, width = draw(sizes), draw(sizes)
    assume(min(config.output_hw(height, width)) >= 1)
    return Case(
        config,
        height,
        width,
        batch=draw(st.integers(least_batch, 3)),
        clips=draw(st.tuples(clips, clips, clips)),
        biases=draw(st.tuples(*[st.booleans()] * 3)),
    )


@st.composite
def layouts(draw):
    """Puts a tensor into storage of another order, with gaps of NaN and an offset."""
    orders = {n: draw(st.permutations(range(n))) for n in (1, 2, 3, 4)}
    all_gaps = draw(st.tuples(*[st.integers(1, 2)] * 4))
    offset = draw(st.integers(0, 7))

    def place(x: Tensor) -> Tensor:
        order, gaps = orders[x.dim()], all_gaps[: x.dim()]
        sizes = [x.shape[i] * gaps[i] for i in order]
        storage = torch.full([offset + torch.Size(sizes).numel()], torch.nan, dtype=x.dtype)
        strided = storage[offset:].view(sizes)[tuple(slice(None, None, gaps[i]) for i in order)]
        placed = strided.permute([order.index(i) for i in range(x.dim())])
        return placed.copy_(x)

    return place


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_it_is(x: Tensor) -> Tensor:
    return x
