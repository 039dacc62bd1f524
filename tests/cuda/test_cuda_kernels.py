"""The CUDA kernels on the CPU against the reference in float64: values, bits, banks, races.

The emulator stops at every race and every access outside shared memory, so each call below asks
about those too.
"""

from dataclasses import replace
from math import inf, isfinite, nan

import cases
import cuda_cases
import emulated_cuda
import pytest
import torch
from cases import LONG, Case, expect, why_wrong
from cuda_cases import (
    DTYPES,
    each_kernel,
    make_inputs,
    needs_emulator,
    one_of_many,
    run,
    taken,
    why_far_is_wrong,
)
from emulated_cuda import A100, H200, KERNELS, SCHEDULES
from special_values import skipping_reference, why_unlike

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig

pytestmark = [pytest.mark.sampled(4), needs_emulator]
# At least so many of the cases of a group must be taken, so that no test is empty.
LEAST = {
    "patch": {"large images": 50},
    "tile": {"whole octets": 80, "S1-width1": 12, "S1-lite0": 12, "S2": 60},
    "generic": dict.fromkeys(cuda_cases.groups(), 8),
}
# Of some groups every step-th case: there are more than time.
STEPS = {
    ("tile", "large images"): 4,
    ("generic", "large images"): 6,
    ("generic", "whole octets"): 4,
    ("generic", "S3"): 2,
}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

OCTETS = BlockConfig(16, 48, 16, residual=True)
STRIDED = BlockConfig(24, 72, 32, stride=2, padding=(0, 1, 1, 1))
T1 = BlockConfig(24, 24, 8, expansion=False)
WIDE = BlockConfig(8, 40, 24, kernel_size=5, dilation=2, padding=(8, 4, 0, 3))
# What is looked at more closely: small, odd, and different in kind.
CLOSE = {
    "patch": [
        Case(OCTETS, 21, 22),
        Case(BlockConfig(16, 40, 24), 20, 23),
        Case(STRIDED, 41, 42, clips=(RELU, RELU, NO_CLIP)),
        Case(replace(T1, out_channels=24, residual=True), 21, 22),
        Case(replace(T1, stride=2, padding=(0, 1, 1, 1)), 41, 42, clips=(NO_CLIP, RELU, RELU6)),
    ],
    "tile": [
        Case(OCTETS, 5, 6),
        Case(STRIDED, 7, 9, clips=(RELU, RELU, NO_CLIP)),
        Case(WIDE, 5, 9),
        Case(T1, 5, 7, clips=(NO_CLIP, RELU, RELU6)),
        Case(BlockConfig(160, 320, 96, residual=False), 4, 3, clips=(NO_CLIP,) * 3),
    ],
    "generic": [
        Case(BlockConfig(5, 19, 5, residual=True), 5, 4),
        Case(BlockConfig(16, 33, 9, stride=2, padding=(0, 0, 1, 1)), 4, 7),
        Case(BlockConfig(4, 17, 6, kernel_size=5, dilation=2, padding=(8, 4, 0, 3)), 3, 9),
        Case(BlockConfig(70, 40, 8, 2, kernel_size=5, padding=(2,) * 4), 4, 6),
        Case(BlockConfig(19, 19, 8, expansion=False), 5, 4, clips=(NO_CLIP, RELU, RELU6)),
    ],
}


@pytest.fixture
def library(kernel):
    return emulated_cuda.library(kernel)


@pytest.fixture
def dtype(dtype_name):
    return DTYPES[dtype_name]


# ---- Values


@each_kernel
@pytest.mark.parametrize("group", cuda_cases.groups())
def test_every_block_that_it_takes(library, dtype, group):
    wrong, count = {}, 0
    step = STEPS.get((library.kernel, group), 1)
    # Dtypes differ in how numbers are read and stored, which a third of the cases shows too.
    first = torch.float32 if library.kernel == "generic" else torch.float16
    fewer = 1 if LONG or dtype == first else 3
    for i, (case, x, weights) in enumerate(taken(library, dtype, group, fewer * step)):
        y = run(library, x, weights, case, **one_of_many(i))
        if reason := why_wrong(y, expect(case, x, weights)):
            wrong[case.id] = reason
        count += 1
    assert not wrong
    assert count >= LEAST[library.kernel].get(group, 0) // fewer


@each_kernel
def test_on_a_smaller_gpu(library, dtype):
    group = {"patch": "large images", "tile": "S1-width1", "generic": "S1-width1"}[library.kernel]
    wrong = {}
    for case, x, weights in list(taken(library, dtype, group))[:12]:
        y = run(library, x, weights, case, device=A100)
        if reason := why_wrong(y, expect(case, x, weights)):
            wrong[case.id] = reason
    assert not wrong


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_the_first_kernel_that_takes_a_block_is_chosen(dtype):
    chosen = set()
    blocks = [*cases.groups()["S1-full"], *cuda_cases.large_images(), *cuda_cases.whole_octets()]
    for case in [*blocks, *cases.groups()["S3"][:40]]:
        # No more than a description is asked about.
        x = torch.empty(1, case.config.in_channels, case.height, case.width, dtype=dtype)
        _, weights = make_inputs(replace(case, height=9, width=9), dtype)
        first = next(
            kernel
            for kernel in KERNELS
            if emulated_cuda.library(kernel).takes(x, weights, **case.settings)
        )
        assert emulated_cuda.chosen(x, weights, **case.settings) == first
        chosen.add(first)
    assert chosen == ({"generic"} if dtype == torch.float32 else set(KERNELS))


# ---- Bits


def of_two_kinds(library, dtype) -> list[tuple]:
    group = {"patch": "large images", "tile": "whole octets", "generic": "S2"}[library.kernel]
    found = list(taken(library, dtype, group))
    return found[:: len(found) // 3]


@each_kernel
def test_neither_the_schedule_nor_the_grid_changes_a_bit(library, dtype):
    for case, x, weights in of_two_kinds(library, dtype):
        y = run(library, x, weights, case)
        for schedule in SCHEDULES[1:]:
            again = run(library, x, weights, case, schedule=schedule)
            assert torch.equal(again.view(BITS[dtype]), y.view(BITS[dtype])), case.id
        for multiprocessors in (1, 2, 1000):
            device = replace(H200, multiprocessors=multiprocessors)
            again = run(library, x, weights, case, device=device)
            assert torch.equal(again.view(BITS[dtype]), y.view(BITS[dtype])), case.id


def test_clusters_are_as_large_as_the_gpu_can_place():
    """The emulator refuses larger ones. The bits are the same."""
    library = emulated_cuda.library("tile")
    case = Case(BlockConfig(64, 384, 64, residual=True), 14, 14)
    x, weights = make_inputs(case, torch.float16)
    results, blocks = [], {}
    for most in (8, 5, 2, 1):
        results.append(run(library, x, weights, case, device=replace(H200, cluster=most)))
        blocks[most] = library.counts.blocks
    assert all(torch.equal(y, results[0]) for y in results)
    assert blocks[8] != blocks[1], "a cluster is the best plan where it can be placed"


def test_tiles_are_as_small_as_they_must_be():
    """So many channels have room for few pixels; whatever the kernel takes has some plan."""
    library = emulated_cuda.library("tile")
    case = Case(BlockConfig(496, 480, 424, dilation=2, padding=(2,) * 4), 5, 25)
    x, weights = make_inputs(case, torch.float16)
    smallest = replace(A100, shared_bytes=99 << 10)
    assert (
        why_wrong(run(library, x, weights, case, device=smallest), expect(case, x, weights)) is None
    )


@each_kernel
def test_an_image_has_the_same_bits_in_every_batch(library, dtype):
    for case, x, weights in of_two_kinds(library, dtype):
        x = torch.cat([x, torch.randn(4, *x.shape[1:]).to(dtype)])
        alone = torch.cat([run(library, image[None], weights, case) for image in x])
        for batch in (2, len(x)):
            for multiprocessors in (2, 132):
                device = replace(H200, multiprocessors=multiprocessors)
                y = run(library, x[:batch], weights, case, device=device)
                assert torch.equal(y.view(BITS[dtype]), alone[:batch].view(BITS[dtype])), case.id


# ---- NaN, infinities and what is outside the image

SPECIAL = (nan, inf, -inf, -0.0, 6e-8)


@each_kernel
def test_special_values_in_x(library, dtype):
    """Image i has them at its i-th place; the other pixels and images must not notice."""
    wrong = {}
    for case in CLOSE[library.kernel]:
        height, width, channels = case.height, case.width, case.config.in_channels
        rows = sorted({0, 1, height // 2, height - 1})
        places = [(r, c) for r in rows for c in sorted({0, width // 2, width - 2, width - 1})]
        x, weights = make_inputs(case, dtype)
        x = x.expand(len(places), -1, -1, -1).clone()
        clean = expect(case, x, weights)
        for value, channel in zip(SPECIAL, (0, channels - 1, 1, channels // 2, 3), strict=True):
            injected = x.clone()
            for i, (row, column) in enumerate(places):
                injected[i, channel, row, column] = value
            y = run(library, injected, weights, case)
            reason = why_unlike(y, skipping_reference(injected, weights, case), clean)
            if reason:
                wrong[f"{case.id}: {value}"] = reason
    assert not wrong


@each_kernel
@pytest.mark.parametrize("name", ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project"))
def test_special_values_in_weights(library, dtype, name):
    """Taps only where no padding is: times that they may be NaN; in patches the expansion too."""
    wrong = {}
    times_padding = {"patch": ("w_expand", "b_expand", "w_dw")}.get(library.kernel, ("w_dw",))
    for case in CLOSE[library.kernel]:
        if name in times_padding:
            config = replace(case.config, padding=(0,) * 4, residual=False)
            case = replace(case, config=config, height=case.height + 6, width=case.width + 6)
        x, weights = make_inputs(case, dtype)
        tensor = getattr(weights, name)
        if tensor is None:
            continue
        clean = expect(case, x, weights)
        for i, value in enumerate(SPECIAL):
            channel = (0, -1, 7, 8, tensor.shape[-1] // 2)[i] % tensor.shape[-1]
            at = (*((i + j) % n for j, n in enumerate(tensor.shape[:-1])), channel)
            injected = tensor.clone()
            injected[at] = value
            changed = replace(weights, **{name: injected})
            y = run(library, x, changed, case)
            if reason := why_unlike(y, skipping_reference(x, changed, case), clean):
                wrong[f"{case.id}: {value} at {at}"] = reason
    assert not wrong


@each_kernel
@pytest.mark.parametrize("bias", (3.0, -3.0, 100.0, 2e5, nan))
def test_padding_is_zero_behind_the_expansion(library, dtype, bias):
    """x is 0, so a kernel that pads x instead has clip(bias) around the expansion, not 0."""
    wrong = {}
    for case in CLOSE[library.kernel]:
        if not case.config.expansion:
            continue
        if bias > torch.finfo(torch.float16).max:
            case = replace(case, clips=(RELU6, RELU6, NO_CLIP))
        x, weights = make_inputs(case, dtype)
        x = torch.zeros_like(x)
        ones = torch.ones_like(weights.b_expand)
        clean = expect(case, x, replace(weights, b_expand=ones * (bias if isfinite(bias) else 3)))
        weights = replace(weights, b_expand=ones * bias)
        y = run(library, x, weights, case)
        if reason := why_unlike(y, skipping_reference(x, weights, case), clean):
            wrong[case.id] = reason
    assert not wrong


@each_kernel
@pytest.mark.parametrize(
    "clips",
    [
        ((1.0, 2.0), (-3.0, -1.0), NO_CLIP),
        ((-3.0, -1.0), (1.0, 2.0), (1.0, 2.0)),
        ((-inf, -0.5), (0.5, inf), (-inf, 0.25)),
        ((2.0, 2.0), (-1.5, -1.5), NO_CLIP),
        ((inf, inf), (0.0, 6.0), (-2.0, 2.0)),
        ((0.0, 6.0), (-inf, -inf), NO_CLIP),
        ((0.0, 0.0), (0.0, 1.0), NO_CLIP),
        ((0.0, 65000.0), (0.0, inf), (5.0, 5.0)),
    ],
    ids=str,
)
def test_clips_that_hold_no_zero(library, dtype, clips):
    """Neither padding nor hidden channels and pixels that do not exist are clipped."""
    wrong = {}
    for case in CLOSE[library.kernel]:
        x, weights = make_inputs(case, dtype)
        weights = replace(weights, w_dw=weights.w_dw.abs(), w_project=weights.w_project.abs())
        clean = expect(case, x, weights)
        clip_expand = clips[0] if case.config.expansion else NO_CLIP
        weights = replace(weights, clip_expand=clip_expand, clip_dw=clips[1], clip_project=clips[2])
        if not library.takes(x, weights, **case.settings):
            continue
        y = run(library, x, weights, case)
        if reason := why_unlike(y, skipping_reference(x, weights, case), clean):
            wrong[case.id] = reason
    assert not wrong


@each_kernel
def test_denormals_are_not_flushed(library, dtype):
    channels = 24
    smallest = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}.get(dtype, 2.0**-149)
    identity = torch.eye(channels, dtype=dtype)
    w_dw = torch.zeros(3, 3, channels, dtype=dtype)
    w_dw[1, 1] = 1
    weights = FoldedWeights(identity, None, w_dw, None, identity, None, RELU6, RELU6)
    case = Case(BlockConfig(channels, channels, channels), 20, 21, biases=(False,) * 3)
    x = (torch.arange(channels * 420) % 60 + 1).reshape(1, channels, 20, 21)
    x = (x.double() * smallest).to(dtype)
    assert x.min() > 0 and torch.equal(run(library, x, weights, case), x)


@each_kernel
def test_sums_of_unbounded_values_do_not_overflow(library, dtype):
    """40000 + 40000 - 80000 is 0, and in fp16 it would be infinite on the way."""
    x = torch.full((1, 8, 20, 22), 40000.0).to(dtype)
    w_dw = torch.zeros(3, 3, 8, dtype=dtype)
    w_dw[1] = torch.tensor([1.0, 1.0, -2.0])[:, None]
    identity = torch.eye(8, dtype=dtype)
    clips = RELU, RELU if library.kernel == "patch" else NO_CLIP, NO_CLIP
    weights = FoldedWeights(identity, None, w_dw, None, identity, None, *clips)
    case = Case(BlockConfig(8, 8, 8), 20, 22, biases=(False,) * 3)
    y = run(library, x, weights, case)
    assert torch.equal(y[..., 1:-1], torch.zeros_like(y[..., 1:-1]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_addresses_in_x_are_64_bit(library):
    assert why_far_is_wrong(library) is None
