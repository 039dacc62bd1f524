"""Any strides, offsets and overlaps of x and the weights; the strides of the result."""

from dataclasses import fields, replace

import pytest
import torch
from cases import LAYOUTS, Case, expect, make_inputs, run, why_wrong
from memory_layouts import at_offset, in_memory_order, inside_nan, layouts_of
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import BlockConfig

CASES = [
    Case(BlockConfig(12, 40, 12, residual=True), 6, 9, batch=2),
    Case(BlockConfig(17, 33, 9, stride=2, kernel_size=5, padding=(1, 1, 2, 2)), 7, 8, batch=3),
    Case(BlockConfig(19, 19, 8, expansion=False), 5, 4, batch=2),
]
TENSORS = [f.name for f in fields(FoldedWeights) if f.name.startswith(("w_", "b_"))]


def fake_strides(x: Tensor, weights, settings: dict) -> tuple[int, ...]:
    tensors = (t if t is None else t.to("meta") for t in (x, *weights.tensors()))
    y = torch.ops.mnv2.inverted_residual(*tensors, *settings.values(), *weights.clips())
    return y.stride()


def check_call(backend: str, x: Tensor, weights, case: Case) -> str | None:
    before = x.clone(memory_format=torch.contiguous_format)
    dense = replace(
        weights,
        **{f: t.clone().contiguous() for f in TENSORS if (t := getattr(weights, f)) is not None},
    )
    y = run(backend, x, weights, **case.settings)
    if not torch.equal(x, before):
        return "x was written to"
    if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return "the result aliases x"
    if not y.is_contiguous(memory_format=torch.channels_last):
        return f"the result has strides {y.stride()}"
    if backend != "reference" and y.stride() != fake_strides(x, weights, case.settings):
        return f"strides {y.stride()}, the fake kernel {fake_strides(x, weights, case.settings)}"
    return why_wrong(y, expect(case, before, dense))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_any_layout_of_x(backend, tested_dtype, case):
    x, weights = make_inputs(case, tested_dtype)
    results = {name: check_call(backend, other, weights, case) for name, other in layouts_of(x)}
    wrong = {name: reason for name, reason in results.items() if reason}
    assert not wrong and len(results) >= 70, wrong


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_any_layout_of_the_weights(backend, tested_dtype, case):
    x, weights = make_inputs(case, tested_dtype)
    wrong = {}
    for field in TENSORS:
        tensor = getattr(weights, field)
        if tensor is None:
            continue
        dims = tuple(range(tensor.dim()))
        layouts = {
            "reversed in memory": in_memory_order(tensor, dims[::-1]),
            "sliced": inside_nan(tensor, dims),
            "every second": inside_nan(tensor, dims, step=2),
            "expanded": tensor[..., :1].expand(tensor.shape),
            "at offset 1": at_offset(tensor, 1),
            "at offset 7": at_offset(tensor, 7),
        }
        for layout, other in layouts.items():
            reason = check_call(backend, x, replace(weights, **{field: other}), case)
            if reason:
                wrong[f"{field} {layout}"] = reason
    assert not wrong


@pytest.mark.parametrize("channels", [1, 16])
def test_sizes_of_one_with_odd_strides(backend, channels):
    config = BlockConfig(channels, 24, channels, residual=True)
    wrong = {}
    for batch, height, width in [(1, 1, 1), (2, 1, 1), (1, 1, 5), (1, 5, 1), (2, 1, 6), (1, 4, 3)]:
        case = Case(config, height, width, batch)
        x, weights = make_inputs(case)
        for layout, memory_format in LAYOUTS.items():
            dense = x.contiguous(memory_format=memory_format)
            for stride in (0, 1, 3, 64, 2**40):
                strides = [
                    stride if n == 1 else s
                    for n, s in zip(dense.shape, dense.stride(), strict=True)
                ]
                reason = check_call(backend, dense.as_strided(x.shape, strides), weights, case)
                if reason:
                    wrong[f"{layout} {tuple(x.shape)} strides {strides}"] = reason
    assert not wrong


def test_empty_batch(backend):
    for config in (case.config for case in CASES):
        case = Case(config, 6, 6, batch=0)
        x, weights = make_inputs(case)
        for layout, memory_format in LAYOUTS.items():
            other = x.contiguous(memory_format=memory_format)
            y = run(backend, other, weights, **case.settings)
            assert y.shape == (0, config.out_channels, *config.output_hw(6, 6)), layout
            assert y.is_contiguous(memory_format=torch.channels_last)
