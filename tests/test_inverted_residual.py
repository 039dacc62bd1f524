"""Values: every backend against the float64 reference, on every shape."""

from dataclasses import replace

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Case, expect, make_inputs, run, why_wrong

from mnv2_kernels import inverted_residual
from mnv2_kernels.block import RELU6, BlockConfig
from mnv2_kernels.timing import num_threads


@pytest.mark.parametrize("group", cases.groups())
def test_values(backend, group):
    failures = []
    for case in cases.groups()[group]:
        x, weights = make_inputs(case)
        expected = expect(case, x, weights)
        for layout, memory_format in LAYOUTS.items():
            y = run(backend, x.to(memory_format=memory_format), weights, **case.settings)
            if reason := why_wrong(y, expected):
                failures.append(f"{case.id} {layout}: {reason}")
    assert not failures, "\n".join(failures)


def test_about_half_a_thousand_distinct_shapes():
    assert len({case.id for group in cases.groups().values() for case in group}) >= 500


def test_edges_cover_every_pair_of_sizes():
    sizes = {(case.height, case.width) for case in cases.groups()["S2"]}
    assert len(sizes) >= 12 * 12 - 4, "a pair is only left out where no output row would exist"


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_run_on_the_reference_unasked(dtype):
    case = cases.groups()["S4"][-1]
    x, weights = make_inputs(case)
    x, weights = x.to(dtype), weights.to(dtype)
    y = inverted_residual(x, weights, **case.settings)
    assert cases.last_backend() == "reference"
    assert why_wrong(y, expect(case, x, weights)) is None


def test_float32_runs_on_the_first_kernel_unasked(kernel_backend):
    case = cases.groups()["S4"][-1]
    x, weights = make_inputs(case)
    inverted_residual(x, weights, **case.settings)
    assert cases.last_backend() == cases.kernel_backends()[0]


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
def test_large_images(kernel_backend, case):
    x, weights = make_inputs(case)
    y = run(kernel_backend, x, weights, **case.settings)
    assert why_wrong(y, expect(case, x, weights)) is None
    for threads in (1, 3):
        with num_threads(threads):
            assert torch.equal(y, run(kernel_backend, x, weights, **case.settings))
