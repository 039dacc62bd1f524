"""The Triton kernel touches nothing but its tensors, and takes them in any layout."""

from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, Case, expect, why_wrong
from memory_bands import BAND, bytes_of, in_bands
from memory_layouts import at_offset, in_memory_order, inside_nan
from torch import Tensor
from triton_cases import (
    CONFIGS,
    DEVICE,
    QUICK,
    each_config,
    each_dtype,
    launch_into,
    make_inputs,
    run,
    run_config,
    steps,
)

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import BlockConfig

pytestmark = pytest.mark.sampled(3)

TENSORS = ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")
CASES = [
    Case(BlockConfig(5, 19, 7, padding=(0, 2, 1, 0)), 4, 5, batch=2),
    Case(BlockConfig(17, 33, 9, stride=2, kernel_size=5, padding=(1, 1, 2, 2)), 5, 6),
    Case(BlockConfig(12, 40, 12, residual=True), 3, 4),
    Case(BlockConfig(19, 19, 8, expansion=False), 5, 4),
    Case(BlockConfig(3, 17, 10, dilation=2, padding=(2,) * 4), 4, 3),
]
QUICK_16 = replace(QUICK, patches=16, chunk=32, in_tile=32, out_tile=16)


@each_dtype
@each_config
def test_bands_around_every_tensor(config, dtype):
    """All inputs lie between NaNs, which would show in y; y between bytes that must stay."""
    config = replace(config, half=dtype == torch.float16)
    wrong = {}
    for i, case in enumerate(CASES):
        if steps(case, config) > 1200:
            continue
        x, weights = make_inputs(case, dtype)
        expected = expect(case, x, weights)
        y_values = torch.full_like(expected.truth, 77, dtype=dtype).permute(0, 2, 3, 1)
        y, y_buffer = in_bands(y_values.contiguous(), "bytes" if i % 2 else "nan")
        x, x_buffer = in_bands(x.permute(0, 2, 3, 1).contiguous(), "nan")
        moved = {n: in_bands(t, "nan") for n in TENSORS if (t := getattr(weights, n)) is not None}
        weights = replace(weights, **{name: view for name, (view, _) in moved.items()})
        inputs = [x_buffer, *(buffer for _, buffer in moved.values())]
        before = [bytes_of(buffer).clone() for buffer in inputs]
        bands = [bytes_of(y_buffer[:BAND]).clone(), bytes_of(y_buffer[-BAND:]).clone()]
        launch_into(y.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weights, case, config)
        after = [bytes_of(buffer) for buffer in inputs]
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            wrong[case.id] = "wrote to its inputs or beside them"
        elif not torch.equal(bands[0], bytes_of(y_buffer[:BAND])):
            wrong[case.id] = "wrote before y"
        elif not torch.equal(bands[1], bytes_of(y_buffer[-BAND:])):
            wrong[case.id] = "wrote behind y"
        elif reason := why_wrong(y.permute(0, 3, 1, 2), expected):
            wrong[case.id] = reason
    assert not wrong


def test_the_bands_notice():
    buffer = in_bands(torch.ones(3, 4), "bytes")[1]
    before = bytes_of(buffer).clone()
    buffer[BAND - 1] = 0
    assert not torch.equal(bytes_of(buffer), before)


def test_every_element_is_written():
    """Fresh memory is NaN, which must not be left anywhere."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        for case in CASES:
            x, weights = make_inputs(case)
            assert run_config(x, weights, case, QUICK_16).isfinite().all(), case.id
    finally:
        torch.use_deterministic_algorithms(False)


def layouts_of(x: Tensor) -> dict[str, Tensor]:
    dense = x.contiguous(memory_format=torch.channels_last)
    narrow = dense[:, :, :, :1]
    return {
        "NCHW": x.contiguous(),
        "reversed in memory": in_memory_order(x, (3, 2, 1, 0)),
        "rows innermost": in_memory_order(x, (0, 1, 3, 2)),
        "channels sliced": inside_nan(dense, (1,)),
        "all sliced": inside_nan(dense, (0, 1, 2, 3)),
        "every second pixel": inside_nan(dense, (2, 3), step=2),
        "images sliced": inside_nan(dense, (0,)),
        "at offset 1": at_offset(dense, 1),
        "at offset 7": at_offset(dense, 7),
        "expanded": narrow.expand(x.shape),
        "flipped": x.flip(1, 2, 3),
        "lazily negated": torch._neg_view(x),
        "overlapping": x.flatten().as_strided(x.shape, (2, 1, 1, 1)),
        "a step of 2**40 for one image": x[:1].as_strided(
            (1, *x.shape[1:]), (2**40, *x.stride()[1:])
        ),
    }


def check_call(x: Tensor, weights: FoldedWeights, case: Case) -> str | None:
    before = x.clone(memory_format=torch.contiguous_format)
    case = replace(case, batch=len(x))
    y = run(x, weights, **case.settings)
    if not torch.equal(x, before):
        return "x was written to"
    if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return "the result aliases x"
    fake = torch.ops.mnv2.inverted_residual_triton(
        *(t if t is None else t.to("meta") for t in (x, *weights.tensors())),
        *case.settings.values(),
        *weights.clips(),
    )
    if y.stride() != fake.stride() or not y.is_contiguous(memory_format=torch.channels_last):
        return f"strides {y.stride()}, of the fake kernel {fake.stride()}"
    names = [n for n in TENSORS if getattr(weights, n) is not None]
    dense = {n: getattr(weights, n).clone(memory_format=torch.contiguous_format) for n in names}
    return why_wrong(y, expect(case, before, replace(weights, **dense)))


@pytest.mark.parametrize("case", [CASES[0], *CASES[2:4]], ids=lambda case: case.id)
def test_any_layout_of_x(case):
    x, weights = make_inputs(case)
    with DEVICE:  # Where the layouts are made.
        results = {n: check_call(other, weights, case) for n, other in layouts_of(x).items()}
    wrong = {name: reason for name, reason in results.items() if reason}
    assert not wrong and len(results) >= 14


@pytest.mark.parametrize("field", TENSORS)
def test_any_layout_of_the_weights(field):
    case = CASES[0]
    x, weights = make_inputs(case)
    tensor = getattr(weights, field)
    dims = tuple(range(tensor.dim()))
    with DEVICE:
        layouts = {
            "reversed in memory": in_memory_order(tensor, dims[::-1]),
            "sliced": inside_nan(tensor, dims),
            "every second": inside_nan(tensor, dims, step=2),
            "expanded": tensor[..., :1].expand(tensor.shape),
            "at offset 3": at_offset(tensor, 3),
        }
    changed = {name: replace(weights, **{field: other}) for name, other in layouts.items()}
    wrong = {n: reason for n, w in changed.items() if (reason := check_call(x, w, case))}
    assert not wrong


def test_empty_batches():
    for case in CASES:
        case = replace(case, batch=0)
        x, weights = make_inputs(case)
        for memory_format in LAYOUTS.values():
            y = run(x.contiguous(memory_format=memory_format), weights, **case.settings)
            size = case.config.output_hw(case.height, case.width)
            assert y.shape == (0, case.config.out_channels, *size)
            assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_small_tensor_fills_no_tile():
    """One of everything, in tiles of 16 and more."""
    for config in CONFIGS.values():
        case = Case(BlockConfig(1, 1, 1), 1, 1)
        x, weights = make_inputs(case)
        assert why_wrong(run_config(x, weights, case, config), expect(case, x, weights)) is None
