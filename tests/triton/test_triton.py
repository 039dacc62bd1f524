"""Values of the Triton backend: every configuration and dtype against the float64 reference."""

from dataclasses import replace

import cases
import pytest
import torch
from cases import LONG, Case, expect, why_wrong
from triton_cases import (
    CONFIGS,
    DEVICE,
    DTYPES,
    HAS_GPU,
    QUICK,
    chosen,
    dtype_name,
    each_config,
    each_dtype,
    make_inputs,
    run,
    run_config,
    small_real_blocks,
    steps,
    with_biases_in_float,
)

from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig
from mnv2_kernels.ops.triton.configs import PatchConfig

pytestmark = pytest.mark.sampled(4)

# For weights too large for the interpreter with the configuration that they would get.
WIDE = replace(QUICK, patches=16, patch_h=1, patch_w=1, chunk=256, out_tiles=8)


def small(group: str, limit: int, step: int) -> list[Case]:
    """Every step-th case of a group that is quick in the interpreter."""
    members = [case for case in cases.groups()[group] if case.batch > 0]
    return [case for case in members if steps(case, QUICK) <= limit][::step]


REAL = small_real_blocks()
ALL = [*REAL, *small("S2", 900, 3), *small("S3", 900, 6), *small("S4", 900, 1)]
HALVES = [*REAL[1:2], *small("S2", 400, 5), *small("S3", 300, 20), *small("S4", 300, 3)]
each_case = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)


def test_the_selection():
    assert len({case.id for case in ALL}) >= 120 and len(HALVES) >= 30
    assert {case.config.kernel_size for case in REAL} == {3, 5}
    assert {case.config.hidden_channels for case in REAL} >= {32, 96, 144, 240, 960, 1152}


@each_case
def test_values(case):
    x, weights = make_inputs(case)
    expected = expect(case, x, weights)
    if HAS_GPU or steps(case, chosen(case)) <= 2000:
        assert why_wrong(run(x, weights, **case.settings), expected) is None
    else:
        assert why_wrong(run_config(x, weights, case, WIDE), expected) is None


# The mean error over eager's in the same dtype, over all of HALVES: it may only fall.
RATCHET = {
    "float16": 0.85,
    "float16, half": 1.45,
    # The interpreter cuts bfloat16 off where a GPU rounds to nearest.
    "bfloat16": 0.85 if HAS_GPU else 2.1,
}


@pytest.mark.parametrize("name", RATCHET)
def test_half_precision(name):
    """Eager is the CPU's wherever this runs, so that there is one set of figures."""
    dtype = getattr(torch, name.split(",")[0])
    ours = eager = 0.0
    wrong = {}
    for case in HALVES:
        x, weights = cases.make_inputs(case)
        x, weights = x.to(dtype), with_biases_in_float(weights, dtype)
        expected = expect(case, x, weights)
        config = replace(chosen(case, dtype), half="half" in name)
        y = run_config(x.to(DEVICE), weights.to(DEVICE), case, config).cpu()
        if reason := why_wrong(y, expected):
            wrong[case.id] = reason
        ours += (y.double() - expected.truth).abs().mean().item()
        eager += expected.eager_mean
    print(f"{name}: {ours / eager:.3f} of eager's mean error")
    assert not wrong
    assert ours / eager < RATCHET[name]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_half_precision_through_the_op(dtype):
    wrong = {}
    for case in HALVES[::3]:
        x, weights = make_inputs(case, dtype)
        if reason := why_wrong(run(x, weights, **case.settings), expect(case, x, weights)):
            wrong[case.id] = reason
    assert not wrong


@each_dtype
@each_config
def test_every_configuration(config, dtype):
    """Two blocks whose channels no tile divides, and some of the selection."""
    odd = Case(BlockConfig(37, 75, 45, stride=2, padding=(0, 1, 2, 0)), 6, 7)
    residual = Case(BlockConfig(20, 50, 20, residual=True), 5, 4, clips=(RELU6, RELU6, RELU6))
    wrong = {}
    for case in (odd, residual, *HALVES[4 :: 6 if LONG else 18]):
        if case not in (odd, residual) and steps(case, config) > 600:
            continue
        x, weights = make_inputs(case, dtype)
        expected = expect(case, x, weights)
        for half in {False, dtype == torch.float16}:
            y = run_config(x, weights, case, replace(config, half=half))
            if reason := why_wrong(y, expected):
                wrong[f"{case.id}, half {half}"] = reason
    assert not wrong


def test_configurations_hold_what_they_say():
    assert {c.patches for c in CONFIGS.values()} == {16, 32, 64}
    assert {c.chunk for c in CONFIGS.values()} == {16, 32, 64}
    assert {c.keep_x for c in CONFIGS.values()} == {True, False}
    assert {c.in_tile for c in CONFIGS.values()} == {16, 32, 64}
    assert {c.out_tile for c in CONFIGS.values()} == {8, 16, 32, 64}
    programs = [-(-45 // (c.out_tile * c.out_tiles)) for c in CONFIGS.values()]
    assert {1, 2, 3} <= set(programs), "programs that share a tile of patches"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel, dilation", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_patches_of_every_size(kernel, dilation, stride):
    """Patches that end beyond the image by every number of rows and columns."""
    config = BlockConfig(8, 24, 8, stride, True, kernel, dilation, padding=(dilation,) * 4)
    wrong = {}
    for height in range(kernel, kernel + 3 * stride, stride):
        case = Case(config, height + 4, height + 5, clips=(RELU6, NO_CLIP, NO_CLIP))
        x, weights = make_inputs(case)
        expected = expect(case, x, weights)
        for patch_h, patch_w in ((1, 3), (2, 3), (3, 1)):
            patched = replace(QUICK, patch_h=patch_h, patch_w=patch_w, out_tile=8, out_tiles=1)
            if reason := why_wrong(run_config(x, weights, case, patched), expected):
                wrong[f"{case.id}, {patch_h}x{patch_w}"] = reason
    assert not wrong


@each_dtype
@pytest.mark.parametrize("expansion", [True, False])
def test_a_patch_as_wide_as_the_image(expansion, dtype):
    """It may leave out the columns that lie outside, but nothing that is done to the others."""
    wrong = {}
    for width, stride in ((1, 1), (2, 1), (4, 1), (5, 2), (7, 2)):
        case = Case(BlockConfig(12, 12, 8, stride, expansion), 4, width)
        x, weights = make_inputs(case, dtype)
        expected = expect(case, x, weights)
        for half in {False, dtype == torch.float16}:
            y = run_config(x, weights, case, replace(QUICK, patch_w=4, half=half))
            if reason := why_wrong(y, expected):
                wrong[f"{case.id}, half {half}"] = reason
    assert not wrong


@pytest.mark.parametrize("half", [False, True])
def test_the_configuration_hardly_matters(half):
    """fp16: the same sums in other orders; with and without x kept, the very same bits."""
    case = Case(BlockConfig(20, 40, 12), 4, 5)
    x, weights = make_inputs(case, torch.float16)
    results = {}
    for name, config in CONFIGS.items():
        config = replace(config, half=half)
        for keep_x in (True, False):
            y = run_config(x, weights, case, replace(config, keep_x=keep_x))
            results.setdefault(name, y)
            assert HAS_GPU or torch.equal(y, results[name]), name
    first = results.pop("2x2")
    for name, y in results.items():
        torch.testing.assert_close(y, first, rtol=2e-2, atol=2e-2, msg=lambda m, n=name: f"{n} {m}")


def test_places_in_a_batch():
    """An image gives the same bits alone and anywhere in a batch, in tiles of other patches."""
    case = Case(BlockConfig(12, 40, 12, residual=True), 5, 6)
    image, weights = make_inputs(case)
    alone = run(image, weights, **case.settings)
    for batch in (2, 3, 8):
        x = torch.randn(batch, *image.shape[1:], device=DEVICE)
        places = sorted({0, 1, batch // 2, batch - 1})
        x[places] = image
        together = run(x, weights, **case.settings)
        assert all(torch.equal(together[i], alone[0]) for i in places)
    assert torch.equal(run(image, weights, **case.settings), alone)


def test_a_configuration_is_chosen_without_the_batch():
    block = BlockConfig(16, 96, 24, stride=2)
    for dtype in DTYPES:
        config = chosen(Case(block, 8, 8), dtype)
        assert isinstance(config, PatchConfig) and not (config.half and dtype != torch.float16)
        assert chosen(Case(block, 9, 7, batch=50), dtype) == config
