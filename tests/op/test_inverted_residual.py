"""Values: every backend against the float64 reference, on every shape."""

import re
from dataclasses import replace
from statistics import geometric_mean

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Case, expect, make_inputs, mean_error, run, why_wrong
from rounding import why_not_rounded_once

from mnv2_kernels import inverted_residual
from mnv2_kernels.block.config import RELU6, BlockConfig
from mnv2_kernels.profiling.timing import num_threads

NARROW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("group", cases.groups())
def test_values(backend, tested_dtype, group):
    failures = []
    for case in cases.tested(group):
        x, weights = make_inputs(case, tested_dtype)
        expected = expect(case, x, weights)
        known = None
        for layout, memory_format in LAYOUTS.items():
            y = run(backend, x.to(memory_format=memory_format), weights, **case.settings)
            if known is not None and torch.equal(y, known):
                continue
            known, reason = y, why_wrong(y, expected)
            if reason is None and tested_dtype in NARROW:
                reason = why_not_rounded_once(y, expected, case, x, weights)
            if reason:
                failures.append(f"{case.id} {layout}: {reason}")
    assert not failures, "\n".join(failures)


# Mean error over the mean error of PyTorch's layers, same dtype, real blocks: may only fall.
NEARER = {torch.bfloat16: 0.95, torch.float16: 0.70}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_nearer_to_the_truth_than_the_layers(dtype):
    ratios = {}
    for name in cases.groups():
        for case in cases.tested(name) if name.startswith("S1") else ():
            x, weights = make_inputs(case, dtype)
            expected = expect(case, x, weights)
            y = run("cpu", x, weights, **case.settings)
            ratios[case.id] = mean_error(y, expected) / expected.eager_mean
    assert max(ratios.values()) <= 1.01, max(ratios.items(), key=lambda item: item[1])
    assert geometric_mean(ratios.values()) <= NEARER[dtype]


@cases.once
def test_about_half_a_thousand_distinct_shapes():
    assert len({case.id for group in cases.groups().values() for case in group}) >= 500


@cases.once
def test_edges_cover_every_pair_of_sizes():
    sizes = {(case.height, case.width) for case in cases.groups()["S2"]}
    assert len(sizes) >= 12 * 12 - 4, "a pair is only left out where no output row would exist"


@cases.once
def test_both_clips_are_active_in_both_hidden_tensors():
    for case in (case for group in cases.groups().values() for case in group):
        config = case.config
        wide = config.in_channels >= 12 and config.hidden_channels >= 64 and case.batch > 0
        large = min(case.height, case.width) >= max(4, 3 * max(config.padding))
        if wide and large and case.clips[:2] == (RELU6, RELU6):
            _check_clips(case)


def _check_clips(case: Case) -> None:
    x, weights = make_inputs(case)
    hidden = torch.eye(case.config.hidden_channels)
    settings = case.settings | {"residual": False}
    depthwise = replace(weights, w_project=hidden, b_project=None)
    stages = [inverted_residual(x, depthwise, backend="reference", **settings)]
    if case.config.expansion:
        bias = 0 if weights.b_expand is None else weights.b_expand[:, None, None]
        expansion = torch.einsum("nchw,cd->ndhw", x, weights.w_expand) + bias
        stages.append(F.hardtanh(expansion, *RELU6))
    for stage in stages:
        zeros, sixes = ((stage == bound).float().mean().item() for bound in RELU6)
        assert 0.05 <= zeros <= 0.8, f"{case.id}: {zeros:.1%} at the lower clip"
        assert 0.01 <= sixes <= 0.3, f"{case.id}: {sixes:.1%} at the upper clip"


@cases.once
def test_other_dtypes_run_on_the_reference_unasked():
    case = cases.groups()["S4"][-1]
    x, weights = make_inputs(case, torch.float64)
    with cases.runs_on("reference"):
        y = inverted_residual(x, weights.to(torch.float64), **case.settings)
    assert why_wrong(y, expect(case, x, weights.to(torch.float64))) is None


def test_the_first_kernel_runs_unasked(kernel_backend, tested_dtype):
    case = cases.groups()["S4"][-1]
    x, weights = make_inputs(case, tested_dtype)
    with cases.runs_on(cases.kernel_backends()[0]):
        inverted_residual(x, weights, **case.settings)


@pytest.mark.parametrize("group", ["S1-width1", "S4"])
def test_biases_may_have_the_dtype_of_x(kernel_backend, tested_dtype, group):
    for case in cases.tested(group):
        x, weights = make_inputs(case, tested_dtype)
        y = run(kernel_backend, x, weights, **case.settings)
        assert torch.equal(run(kernel_backend, x, weights.to(tested_dtype), **case.settings), y), (
            case.id
        )


def test_padding_left_out_keeps_the_size(backend):
    for kernel in (3, 5):
        for dilation in (1, 2):
            pad = dilation * (kernel - 1) // 2
            config = BlockConfig(8, 32, 8, 1, True, kernel, dilation, (pad,) * 4, True)
            case = Case(config, 7, 6)
            x, weights = make_inputs(case)
            y = run(backend, x, weights, dilation=dilation, residual=True)
            assert why_wrong(y, expect(case, x, weights)) is None, case.id


LARGE = [
    # Large images with small weights go in strips of columns, all chunks in one walk.
    Case(BlockConfig(24, 144, 24, residual=True), 36, 261),
    Case(BlockConfig(16, 96, 24, stride=2), 31, 403),
    Case(BlockConfig(17, 100, 21, kernel_size=5, dilation=2, padding=(3, 4, 2, 1)), 50, 205),
    Case(BlockConfig(32, 32, 16, expansion=False), 40, 1201),
    # Large weights: chunk by chunk, in strips where not even one row fits.
    Case(BlockConfig(128, 768, 128), 3, 1501),
]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_large_images(kernel_backend, tested_dtype, case):
    x, weights = make_inputs(case, tested_dtype)
    y = run(kernel_backend, x, weights, **case.settings)
    expected = expect(case, x, weights)
    assert why_wrong(y, expected) is None
    if tested_dtype in NARROW:
        assert why_not_rounded_once(y, expected, case, x, weights) is None
    for threads in (1, 3):
        with num_threads(threads):
            assert torch.equal(y, run(kernel_backend, x, weights, **case.settings))


# Per case, what its schedule must say in 16 bits: the ways through a block that there are.
WAYS = {
    LARGE[0]: "rows outside",  # in strips of columns
    LARGE[4]: "chunks outside",  # in strips, and in bands of rows whose sums are in scratch
    Case(BlockConfig(24, 144, 32, stride=2), 56, 56): "chunks outside",  # in bands alone
    Case(BlockConfig(160, 960, 160, residual=True), 7, 7): "chunks outside",  # hidden groups
}


def print_schedules() -> None:
    for case in WAYS:
        for dtype in NARROW:
            run("cpu", *make_inputs(case, dtype), **case.settings)


def test_every_way_through_a_block_is_among_the_cases(kernel_backend, python):
    """`python test_inverted_residual.py`: what was walked, as the kernel itself says it."""
    done = python(__file__, MNV2_PRINT_CONFIGS="1")
    assert done.returncode == 0, done.stderr
    tested = [case for group in cases.groups().values() for case in group] + LARGE
    assert all(case in tested for case in WAYS)
    for case, order in WAYS.items():
        config = case.config
        channels = f"{config.in_channels}-{config.hidden_channels}-{config.out_channels}"
        block = f" {case.height}x{case.width} {channels} k3 s{config.stride}: "
        lines = [line for line in done.stderr.splitlines() if block in line]
        assert lines, f"{block} in {done.stderr}"
        height, width = config.output_hw(case.height, case.width)
        for line in lines:
            found = {key: int(n) for key, n in re.findall(r"(\w+) (\d+)", line)}
            assert order in line
            assert found["hidden_chunk"] < config.hidden_channels, line
            assert (found["strip_cols"] < width) == (case in LARGE), line
            assert (found["hidden_groups"] == 2) == ((height, width) == (7, 7)), line
            in_bands = order == "chunks outside" and found["hidden_groups"] == 1
            assert (found["band_rows"] < height) == in_bands, line


if __name__ == "__main__":
    print_schedules()
