"""The fused backward pass: values to the bit, pieces, NaN, threads, what is asked for."""

from dataclasses import replace
from itertools import product
from math import inf, nan

import cases
import pytest
import torch
from cases import Case, make_inputs
from exact_gradients import NAMES, found_gradients, make_call, true_gradients, wrong

from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig, mobilenet_v2_block_inputs
from mnv2_kernels.ops import gradients
from mnv2_kernels.profiling import memory

pytestmark = pytest.mark.usefixtures("one_thread")
compiled = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)
FEW = [
    Case(BlockConfig(5, 19, 5, residual=True), 7, 6, 2),
    Case(BlockConfig(16, 33, 9, stride=2, padding=(0, 0, 1, 1)), 6, 9, 3),
    Case(BlockConfig(4, 17, 6, kernel_size=5, dilation=2, padding=(8, 4, 0, 3)), 5, 9, 2),
    Case(BlockConfig(8, 24, 8, 2, kernel_size=5, padding=(2,) * 4), 8, 8, clips=(NO_CLIP,) * 3),
    Case(BlockConfig(19, 19, 8, expansion=False), 5, 6, 3, clips=(NO_CLIP, RELU, RELU6)),
    Case(BlockConfig(5, 40, 6, padding=(0,) * 4), 8, 7, 2),
    Case(BlockConfig(8, 150, 8, residual=True), 4, 5, 5, clips=(RELU6, RELU6, (-2.0, 2.0))),
]
each_case = pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)


def share_between(values: torch.Tensor, clip) -> float:
    return ((values > clip[0]) & (values < clip[1])).float().mean().item()


@compiled
@pytest.mark.parametrize("group", ("S1-width1", "S1-lite0", "S2", "S3", "S4"))
def test_every_gradient_to_the_bit(group):
    failed = {}
    for case in cases.tested(group):
        call = make_call(case)
        names = wrong(found_gradients(*call), true_gradients(*call))
        if names:
            failed[case.id] = names
    assert not failed


@cases.once
def test_those_inputs_are_exact_and_reach_the_clips():
    """Gradients are not zero throughout, values lie at the bounds, and no sum is too long."""
    for case in cases.groups()["S2"][::20] + cases.groups()["S1-width1"][1:4]:
        tensors, settings, grad_y = make_call(case)
        for gradient in true_gradients(tensors, settings, grad_y):
            assert 0 < gradient.abs().max() < 2**22, case.id
        x, w_expand, b_expand = tensors[:3]
        h = torch.einsum("nchw,cd->ndhw", x, w_expand) + b_expand[:, None, None]
        assert ((h == 0) | (h == 6)).any() and 0.05 < share_between(h, RELU6) < 0.95, case.id


@compiled
def test_many_bands_and_chunks_and_images():
    """Images larger than one band holds, more images and chunks than ranges of them."""
    for config, size, batch in (
        (BlockConfig(8, 72, 8, residual=True), (61, 64), 1),
        (BlockConfig(8, 48, 8, 2, kernel_size=5, padding=(1, 2, 2, 1)), (67, 81), 2),
        (BlockConfig(3, 40, 5, kernel_size=5, dilation=2, padding=(4,) * 4), (45, 70), 1),
        (BlockConfig(24, 24, 8, expansion=False), (90, 100), 1),
        (BlockConfig(8, 16, 8, 2, dilation=2, padding=(4, 0, 4, 0)), (50, 333), 1),
        (BlockConfig(8, 650, 8, residual=True), (4, 3), 19),
        (BlockConfig(4, 8, 4), (1, 1500), 1),
        (BlockConfig(4, 8, 4), (1500, 1), 1),
    ):
        case = Case(config, *size, batch)
        call = make_call(case)
        assert wrong(found_gradients(*call), true_gradients(*call)) == [], case.id


@cases.once
@each_case
@pytest.mark.parametrize("piece", (1, 700, 1 << 20))
def test_pieces_of_any_size(monkeypatch, case, piece):
    """What runs where there is no kernel: float64 here."""
    monkeypatch.setattr(gradients, "_PIECE", piece)
    tensors, settings, grad_y = make_call(case)
    tensors = [t if t is None else t.double() for t in tensors]
    call = tensors, settings, grad_y.double()
    assert wrong(found_gradients(*call), true_gradients(*call)) == []


@pytest.mark.parametrize(
    "by", (pytest.param("kernel", marks=compiled), pytest.param("pieces", marks=cases.once))
)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_summed_in_float32(monkeypatch, dtype, by):
    """Integers are exact in float16 up to 2048: what is larger is rounded once, at the end."""
    if by == "pieces":
        monkeypatch.setattr(gradients, "missing", "left out")
        monkeypatch.setattr(gradients, "_PIECE", 20000)
    case = Case(BlockConfig(16, 48, 16, residual=True), 30, 30, 16)
    tensors, settings, grad_y = make_call(case)
    tensors = [t if t is None else t.to(dtype) for t in tensors]
    call = tensors, settings, grad_y.to(dtype)
    found, truth = found_gradients(*call), true_gradients(*call)
    assert max(g.abs().max() for g in truth) > 2048
    for name, ours, exact in zip(NAMES, found, truth, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, exact.float().to(dtype)), name


@compiled
def test_every_subset():
    case = Case(BlockConfig(6, 40, 6, residual=True), 5, 6, 2, clips=(RELU6, RELU6, (-3.0, 3.0)))
    tensors, settings, grad_y = make_call(case)
    truth = true_gradients(tensors, settings, grad_y)
    for needs in product((False, True), repeat=7):
        found = found_gradients(tensors, settings, grad_y, list(needs))
        expected = [t if needed else None for t, needed in zip(truth, needs, strict=True)]
        assert wrong(found, expected) == [], needs


@compiled
@each_case
def test_strides_of_gradients_and_weights(case):
    tensors, settings, grad_y = make_call(case)
    truth = true_gradients(tensors, settings, grad_y)
    strided = [t if t is None else t.mT.contiguous().mT if t.dim() > 1 else t for t in tensors]
    strided = [t if t is None else t.repeat_interleave(2, 0)[::2] for t in strided]
    grad_y = torch.stack([grad_y, -grad_y], -1)[..., 0]
    assert not grad_y.is_contiguous()
    found = found_gradients(strided, settings, grad_y)
    assert wrong(found, truth) == []
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert all(g is None or g.is_contiguous() for g in found[1:])


@each_case
def test_an_empty_batch_gives_zeros(case):
    for dtype in (torch.float32, torch.float64):
        tensors, settings, grad_y = make_call(replace(case, batch=0))
        tensors = [t if t is None else t.to(dtype) for t in tensors]
        for t, g in zip(tensors, found_gradients(tensors, settings, grad_y.to(dtype)), strict=True):
            assert t is None or (g.shape == t.shape and g.dtype == dtype and not g.any())


@compiled
@pytest.mark.parametrize("value", (nan, inf))
@pytest.mark.parametrize("place", ("x", "grad_y", "w_expand", "w_project", "b_dw"))
def test_not_a_number_comes_out_where_the_layers_give_it(place, value):
    """But that padding contributes nothing to a tap, where the layers multiply it by 0."""
    for case in FEW:
        tensors, settings, grad_y = make_call(case)
        target = grad_y if place == "grad_y" else tensors[NAMES.index(place)]
        if target is None:
            continue
        target.view(-1)[len(target.view(-1)) // 2] = value
        eager = [t if t is None else t.clone().requires_grad_() for t in tensors]
        found = found_gradients(tensors, settings, grad_y)
        truth = true_gradients(eager, settings, grad_y)
        for name, ours, theirs in zip(NAMES, found, truth, strict=True):
            if ours is None:
                continue
            if name == "w_dw" and any(case.config.padding):
                assert (ours.isfinite() | ~theirs.isfinite()).all(), case.id
            else:
                assert torch.equal(ours.isfinite(), theirs.isfinite()), (name, case.id)


@compiled
def test_the_same_bits_at_any_number_of_threads():
    differing = []
    sized = [Case(c, size // 2, size // 2) for c, size in list(mobilenet_v2_block_inputs())[::4]]
    for case in FEW + sized:
        for batch in (1, 2, 5, 9):
            x, weights = make_inputs(replace(case, batch=batch))
            call = [x, *weights.tensors()], (*case.settings.values(), *weights.clips())
            y = torch.ops.mnv2.inverted_residual(*call[0], *call[1])
            grad_y = torch.randn_like(y)
            results = []
            for threads in (1, 2, 3, 7, 1):
                torch.set_num_threads(threads)
                results.append(found_gradients(*call, grad_y))
            for name, *found in zip(NAMES, *results, strict=True):
                if found[0] is not None and not all(torch.equal(f, found[0]) for f in found):
                    differing.append((case.id, batch, name))
    assert not differing


@cases.once
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_gradient_of_another_shape_is_refused(dtype):
    tensors, settings, grad_y = make_call(FEW[0])
    tensors = [t if t is None else t.to(dtype) for t in tensors]
    with pytest.raises(ValueError, match=r"grad_y must have .*\(?2, 5, 7, 6\)?"):
        found_gradients(tensors, settings, grad_y[:, :, :3].to(dtype))


@cases.once
@compiled
def test_nothing_as_large_as_an_expanded_tensor_is_allocated():
    """Scratch is a few hundred KiB a thread; parts of sums are as large as x or the weights."""
    for config, size in list(mobilenet_v2_block_inputs())[1:]:
        x, weights = make_inputs(Case(config, size, size, 4))
        call = [x, *weights.tensors()], (*Case(config, 1, 1).settings.values(), *weights.clips())
        grad_y = torch.randn_like(torch.ops.mnv2.inverted_residual(*call[0], *call[1]))
        sizes = memory.allocations(lambda call=call, grad_y=grad_y: found_gradients(*call, grad_y))
        largest = max(x.nbytes, *(w.nbytes for w in weights.tensors() if w is not None))
        assert max(sizes) <= max(largest, grad_y.nbytes, 450 * 1024), config.name
        expanded = 4 * 4 * config.hidden_channels * size * size
        held = memory.peak_bytes(lambda call=call, grad_y=grad_y: found_gradients(*call, grad_y))
        assert held < expanded or size <= 14, config.name
