"""What the tests of the emulated CUDA kernels share: their own blocks, and one checked call."""

import mmap
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import cases
import emulated_cuda
import pytest
import torch
from cases import Case
from emulated_cuda import H200, KERNELS, SCHEDULES, Guarded, Library
from torch import Tensor
from triton_cases import with_biases_in_float

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig, same_padding

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What each kernel computes in: only one has no tensor cores.
KERNEL_DTYPES = [
    (kernel, dtype)
    for kernel in KERNELS
    for dtype in DTYPES
    if kernel == "generic" or dtype != "float32"
]
each_kernel = pytest.mark.parametrize("kernel, dtype_name", KERNEL_DTYPES)
needs_emulator = pytest.mark.skipif(
    emulated_cuda.why_not() is not None, reason=str(emulated_cuda.why_not())
)
CLIPS = (
    (RELU6, RELU6, NO_CLIP),
    (RELU, RELU, NO_CLIP),
    (RELU6, RELU6, RELU6),
    ((0.0, 3.0), (0.0, 100.0), (-1.0, 1.5)),
)
BIASES = ((True, True, True), (False, True, True), (True, False, False), (False, False, False))


def make_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, FoldedWeights]:
    """`cases.make_inputs` in a dtype, with biases as `fold` leaves them."""
    x, weights = cases.make_inputs(case)
    return x.to(dtype), with_biases_in_float(weights, dtype)


def run(library: Library, x: Tensor, weights: FoldedWeights, case: Case, **options) -> Tensor:
    """One call, in which no matrix may take more than one pass over the banks."""
    y = library.run(x, weights, **case.settings, **options)
    counts = library.counts
    assert counts.passes == counts.matrices, f"{case.id}: bank conflicts, {counts}"
    assert (counts.matrices > 0) == (library.kernel != "generic")
    return y


def _padded(row: dict, config: BlockConfig) -> BlockConfig:
    extent = config.dilation * (config.kernel_size - 1)
    padding = {
        "none": (0, 0, 0, 0),
        "symmetric": same_padding(config.kernel_size, config.dilation),
        "tensorflow": cases.tf_same_padding(config, row["height"], row["width"]),
        "one-sided": (0, extent, 1, 0),
        "all": (extent,) * 4,
    }[row["padding"]]
    return replace(config, padding=padding)


def _case(row: dict) -> Case:
    expansion = row.get("expansion", True)
    c_in, hidden, c_out = row["channels"]
    config = BlockConfig(
        *(c_in, hidden if expansion else c_in, c_out, row["stride"], expansion),
        *(row.get("kernel", 3), row.get("dilation", 1)),
    )
    config = _padded(row, config)
    height, width = row["height"], row["width"]
    same = config.output_hw(height, width) == (height, width) and c_in == c_out
    config = replace(config, residual=same and row["residual"])
    return Case(config, height, width, row["batch"], row["biases"], row["clips"])


def _drawn(count: int, choices: dict[str, Sequence], least: int) -> list[Case]:
    """So many cases with at least so many rows and columns of outputs, always the same."""
    draw, drawn = random.Random(0), []
    while len(drawn) < count:
        case = _case({name: draw.choice(values) for name, values in choices.items()})
        if min(case.config.output_hw(case.height, case.width)) >= least:
            drawn.append(case)
    return drawn


@cache
def large_images() -> list[Case]:
    """Few channels on at least 20 x 20 outputs: tails of patches, tiles, chunks and channels."""
    choices = {
        "height": (20, 21, 22, 23, 33, 40, 45),
        "width": (20, 21, 25, 27, 38, 40, 47),
        "stride": (1, 2),
        "padding": ("none", "symmetric", "tensorflow", "one-sided", "all"),
        "channels": (
            *((8, 8, 8), (8, 48, 16), (16, 96, 24), (24, 144, 24), (24, 72, 32)),
            *((32, 192, 32), (32, 40, 8), (16, 56, 16)),
        ),
        "batch": (1, 2),
        "biases": BIASES,
        "clips": CLIPS,
        "residual": (True, False),
    }
    without_expansion = {
        **choices,
        "expansion": (False,),
        "channels": (
            (8, 8, 8),
            (16, 16, 24),
            (24, 24, 24),
            (24, 24, 16),
            (32, 32, 16),
            (32, 32, 32),
        ),
        "clips": tuple((NO_CLIP, *clips[1:]) for clips in CLIPS),
    }
    return _drawn(50, choices, least=20) + _drawn(25, without_expansion, least=20)


@cache
def whole_octets() -> list[Case]:
    """Any block whose channels are multiples of 8, on small images."""
    sizes = (1, 2, 3, 5, 7, 8, 9, 14, 17)
    return _drawn(
        100,
        {
            "height": sizes,
            "width": sizes,
            "stride": (1, 2),
            "kernel": (3, 5),
            "dilation": (1, 2),
            "padding": ("none", "symmetric", "tensorflow", "one-sided", "all"),
            "channels": (
                *((8, 8, 8), (8, 48, 24), (40, 240, 40), (64, 384, 64), (24, 72, 40)),
                *((160, 96, 320), (56, 336, 112), (320, 32, 8)),
            ),
            "expansion": (True, False),
            "batch": (1, 2, 3, 9),
            "biases": BIASES,
            "clips": (*CLIPS, (NO_CLIP,) * 3, ((-1.5, 2.5), (-0.5, 3.0), (-2.0, 1.0))),
            "residual": (True, False),
        },
        least=1,
    )


@cache
def groups() -> dict[str, list[Case]]:
    """Every case, by the name of its group."""
    shared = {
        name: [case for case in group if case.batch]
        for name, group in cases.groups().items()
        if name != "S1-full"
    }
    return {**shared, "large images": large_images(), "whole octets": whole_octets()}


def taken(library: Library, dtype: torch.dtype, group: str, step: int = 1) -> Iterator[tuple]:
    """(case, x, weights) of every step-th case of a group, where the kernel takes it."""
    for case in groups()[group][::step]:
        x, weights = make_inputs(case, dtype)
        if library.takes(x, weights, **case.settings):
            yield case, x, weights


def one_of_many(i: int) -> dict:
    """Options of the i-th call: schedule, seed and GPU in turn."""
    device = replace(H200, multiprocessors=(132, 1, 3)[i // 3 % 3])
    return {"schedule": SCHEDULES[i % 3], "seed": i, "device": device}


FAR = 2**14


def why_far_is_wrong(library: Library) -> str | None:
    """Corners of images of 2**28 pixels, 8 channels each: offsets in x need 64 bits.

    Only pages that are touched exist; what wraps around finds zeros below the images.
    """
    count, size, channels, below = 3, 20, 8, 2**32
    case = Case(BlockConfig(channels, 24, channels), size, size, batch=count)
    near, weights = make_inputs(case, torch.float16)
    near = near.contiguous(memory_format=torch.channels_last)
    used = count * FAR * FAR * channels
    no_reserve = 0x4000  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * (below + used), flags)
    x = torch.frombuffer(memory, dtype=torch.float16, offset=2 * below, count=used)
    x.view(count, FAR, FAR, channels)[:, :size, :size] = near.permute(0, 2, 3, 1)

    class Placed(Guarded):
        def __init__(self, values):
            super().__init__(values)
            if values.data_ptr() == near.data_ptr():
                self.address = x.data_ptr()

    y = library.run(near, weights, **case.settings, place=Placed, image=(FAR, FAR))
    # The same images with a border of the zeros that surround these.
    wide = torch.zeros(count, channels, size + 1, size + 1, dtype=torch.float16)
    wide[:, :, :size, :size] = near
    expected = cases.expect(replace(case, height=size + 1, width=size + 1), wide, weights)
    return cases.why_wrong(y, replace(expected, truth=expected.truth[:, :, :size, :size]))
