"""The op of blocks with curves, squeeze-excite or a dense convolution: values, gradients, and what
PyTorch is told.
"""

from dataclasses import replace
from functools import partial
from math import inf, nan

import cases
import pytest
import torch
from mbconv_blocks import CURVES, GATED, MBConvCase, in_dtype, mbconv_cases
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import mnv2_kernels as mk
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, SCALES, BlockConfig
from mnv2_kernels.block.fold import fold_layers
from mnv2_kernels.ops import backends, gradients
from mnv2_kernels.ops.decompositions import DECOMPOSITIONS
from mnv2_kernels.ops.inverted_residual import op_arguments
from mnv2_kernels.ops.mbconv import MBConvArguments

pytestmark = pytest.mark.usefixtures("one_thread")

OP = torch.ops.mnv2.mbconv.default
BACKWARD = torch.ops.mnv2.mbconv_backward.default
CASES = list(mbconv_cases())
SAMPLES = CASES[::10]
CPU = [name for name in ("cpu", "reference") if name in cases.backends()]
on_the_cpu = pytest.mark.parametrize("name", CPU)


def arguments(case: MBConvCase, requires_grad: bool = False) -> tuple:
    x, weights = case.inputs()
    found = (x.to(memory_format=torch.channels_last), *op_arguments(weights, case.config))
    assert isinstance(op_arguments(weights, case.config), MBConvArguments)
    return (*(t.requires_grad_() if requires_grad and isinstance(t, Tensor) else t for t in found),)


def test_the_cases_are_of_all_kinds():
    assert len(CASES) >= 100 and len(SAMPLES) >= 10
    seen = {a for case in CASES for a in (*case.between, case.squeeze, case.scale)}
    assert seen == {NO_CLIP, RELU, RELU6, *CURVES, *SCALES}
    assert {case.config.kernel_size for case in CASES if case.config.dense} == {1, 3, 5}
    assert {case.config.kernel_size for case in CASES if not case.config.dense} == {3, 5, 7}
    assert {case.config.dilation for case in CASES} == {1, 2, 4}


def test_the_reference_is_the_layers():
    for case in CASES:
        x, weights = case.inputs(torch.float64)
        layers = case.layers().double()
        weights = fold_layers(layers.block_layers())
        y = mk.inverted_residual(x, weights, **case.settings)
        torch.testing.assert_close(y, layers(x), msg=lambda said, c=case: f"{c}: {said}")
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n in CPU for d in cases.dtypes(n)])
def test_values(name, dtype):
    for case in CASES:
        x, weights = case.inputs(dtype)
        expected = cases.expect(case, x, weights)
        for layout in cases.LAYOUTS.values():
            image = x.contiguous(memory_format=layout)
            y = cases.run(name, image, weights, **case.settings)
            assert (reason := cases.why_wrong(y, expected)) is None, (case, reason)
            assert y.is_contiguous(memory_format=torch.channels_last)


@on_the_cpu
def test_an_empty_batch(name):
    for case in SAMPLES:
        x, weights = case.inputs()
        y = mk.inverted_residual(x, weights, **case.settings)
        empty = cases.run(name, x[:0], weights, **case.settings)
        assert empty.shape == (0, *y.shape[1:])
    args = arguments(GATED)
    grads = BACKWARD(torch.empty(0, 8, 6, 7), args[0][:0], *args[1:], [True] * 11)
    assert all(not g.any() for g in grads)


@on_the_cpu
def test_an_image_with_nan_is_the_only_one(name):
    """Its gate is NaN, and with it all of its result."""
    x, weights = GATED.inputs()
    clean = cases.run(name, x, weights, **GATED.settings)
    x[0, 3, 2, 1] = nan
    y = cases.run(name, x, weights, **GATED.settings)
    assert y[0].isnan().all() and torch.equal(y[1:], clean[1:])
    for value in (inf, -inf):
        x[0, 3, 2, 1] = value
        y = cases.run(name, x, weights, **GATED.settings)
        truth = cases.run("reference", x, weights, **GATED.settings)
        assert torch.equal(y.isnan(), truth.isnan()) and torch.equal(y[1:], clean[1:])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    for case in SAMPLES:
        opcheck(OP, arguments(case, requires_grad))


def test_opcheck_of_backward():
    for i, case in enumerate(SAMPLES):
        args = arguments(case)
        needs_grad = [t is not None and (i >> bit) % 2 == 0 for bit, t in enumerate(args[:11])]
        opcheck(BACKWARD, (torch.randn_like(OP(*args)), *args, needs_grad))


def of_layers(case: MBConvCase) -> tuple:
    """x, the layers and what they are folded to in float64, and the true gradients."""
    layers = case.layers().double()
    x = case.inputs(torch.float64)[0].requires_grad_()
    leaves = [x, *layers.parameters()]
    y = layers(x)
    grad_y = torch.randn_like(y)
    truth = torch.autograd.grad(y, leaves, grad_y)
    return x, leaves, fold_layers(layers.block_layers()), grad_y, truth


@pytest.mark.parametrize("piece", [1, 1 << 20], ids=["image by image", "at once"])
def test_gradients_in_float64(piece, monkeypatch):
    monkeypatch.setattr(gradients, "_PIECE", piece)
    for case in CASES[::4]:
        x, leaves, weights, grad_y, truth = of_layers(case)
        args = op_arguments(weights, case.config)
        tensors = (x, *args[:10])
        with torch.no_grad():
            needs_grad = [t is not None for t in tensors]
            found = BACKWARD(grad_y, x, *args, needs_grad)
        of_x, *of_weights = found
        torch.testing.assert_close(of_x, truth[0])
        folded = [t for t in tensors[1:] if t is not None]
        of_layers_ = torch.autograd.grad(folded, leaves[1:], of_weights)
        torch.testing.assert_close(list(of_layers_), list(truth[1:]))


@on_the_cpu
def test_gradients_through_a_call(name):
    for case in SAMPLES:
        x, leaves, weights, grad_y, truth = of_layers(case)
        single = [x.float().detach().requires_grad_()]
        y = mk.inverted_residual(
            single[0], in_dtype(weights, torch.float32), backend=name, **case.settings
        )
        found = torch.autograd.grad(y, [*single, *leaves[1:]], grad_y.float())
        for ours, theirs in zip(found, truth, strict=True):
            bound = 1e-4 * max(1.0, theirs.abs().max().item())
            assert (ours - theirs).abs().max() < bound, case


def test_a_subset_of_gradients():
    args = arguments(GATED)
    grad_y = torch.randn_like(OP(*args))
    everything = BACKWARD(grad_y, *args, [True] * 11)
    for i in range(11):
        (one,) = BACKWARD(grad_y, *args, [i == j for j in range(11)])
        torch.testing.assert_close(one, everything[i])
    assert BACKWARD(grad_y, *args, [False] * 11) == []


def test_what_is_refused():
    args = arguments(GATED, requires_grad=True)
    with pytest.raises(NotImplementedError, match="^mbconv: vmap is not supported"):
        torch.vmap(lambda x: OP(x, *args[1:]))(torch.stack([args[0].detach()] * 2))
    (grad,) = torch.autograd.grad(OP(*args).sum(), args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="^mbconv: second derivatives are not"):
        grad.sum().backward()


def test_forward_mode():
    x, weights = GATED.inputs(torch.float32)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        y = mk.inverted_residual(dual, weights, **GATED.settings)
        truth = GATED.layers()(dual)
        found = [forward_ad.unpack_dual(t).tangent for t in (y, truth)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


class Called(nn.Module):
    """The function with the weights of a case."""

    def __init__(self, case: MBConvCase):
        super().__init__()
        weights = case.inputs()[1]
        self.case, self.weights = case, weights

    def forward(self, x: Tensor) -> Tensor:
        return mk.inverted_residual(x, self.weights, **self.case.settings)


def test_compiled_whole():
    clips = replace(GATED, between=(RELU6, "silu", NO_CLIP), squeeze=RELU)
    for case in (*SAMPLES[:4], clips):
        torch.compiler.reset()
        x, weights = case.inputs()
        call = partial(mk.inverted_residual, weights=weights, **case.settings)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        found = [f(leaf) for f, leaf in zip((call, compiled), leaves, strict=True)]
        assert torch.equal(*found)
        grads = torch.autograd.grad(sum(y.sum() for y in found), leaves)
        torch.testing.assert_close(*grads)


def test_exported():
    for case in SAMPLES[:4]:
        x, module = case.inputs()[0], Called(case)
        exported = torch.export.export(module, (x,))
        assert [str(n.target) for n in exported.graph.nodes].count("mnv2.mbconv.default") == 1
        assert torch.equal(exported.module()(x), module(x))
        decomposed = exported.run_decompositions(DECOMPOSITIONS)
        assert not any("mnv2" in str(node.target) for node in decomposed.graph.nodes)
        torch.testing.assert_close(decomposed.module()(x), module(x))


@on_the_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    for case in SAMPLES:
        x, weights = case.inputs()
        # Numbers of the dtype, since autocast leaves biases as they are.
        weights = in_dtype(in_dtype(weights, dtype), torch.float32)
        with torch.autocast("cpu", dtype):
            y = cases.run(name, x, weights, **case.settings)
            layers = case.layers()(x)
        assert y.dtype == layers.dtype, case
        assert y.dtype == (torch.float32 if case.config.residual else dtype)
        settings = case.settings | {"residual": False}
        rest = cases.run(name, x.to(dtype), in_dtype(weights, dtype), **settings)
        rest = rest + x if case.config.residual else rest
        if name == "cpu":
            assert torch.equal(y, rest)


def test_flops_are_those_of_the_layers():
    for case in SAMPLES:
        x, weights = case.inputs()
        counted = []
        for call in (
            case.layers(),
            partial(mk.inverted_residual, weights=weights, **case.settings),
            partial(mk.inverted_residual, weights=weights, backend="reference", **case.settings),
        ):
            with FlopCounterMode(display=False) as counter:
                call(x)
            counted.append(counter.get_total_flops())
        assert len({*counted}) == 1 and counted[0] > 0, (case, counted)


def test_flops_of_gradients():
    """Two products for one of the forward pass where all gradients are needed."""
    args = arguments(GATED)
    counted = []
    needs = {"everything": [True] * 11, "w_excite": [i == 9 for i in range(11)]}
    for call in (
        lambda: OP(*args),
        *(partial(BACKWARD, OP(*args), *args, flags) for flags in needs.values()),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
    forward, everything, w_excite = counted
    assert everything == 2 * forward
    # Of the product with the gate, and of the weight.
    assert w_excite == 2 * 2 * (24 * 6 * 7 * 8 + 6 * 24)


def test_triton_runs_on_gpus_what_the_cuda_kernels_decline(monkeypatch):
    monkeypatch.setattr(backends, "cuda_missing", None)
    cuda = next(b for b in backends.BACKENDS if b.name == "cuda")
    triton = backends.triton.missing() is None
    for case, name in (
        (GATED, "squeeze-excite"),
        (replace(GATED, config=replace(GATED.config, squeeze_channels=0)), "hardswish"),
        (replace(GATED, between=(RELU6, RELU6, NO_CLIP)), "squeeze-excite"),
        (replace(DENSE, between=(NO_CLIP, RELU6, NO_CLIP)), "a dense convolution"),
    ):
        block = backends.Block.of(case.config, case.between)
        assert block.gate == (case.config.squeeze_channels > 0)
        with FakeTensorMode():
            channels = case.config.in_channels
            x = torch.empty(2, channels, 6, 7, device="cuda", dtype=torch.float16)
            assert cuda.why_refused(x, block) == f"there is no kernel for {name} yet"
            runs = triton and name in ("squeeze-excite", "hardswish")
            assert backends.choose(None, x, block) == ("triton" if runs else "reference")
            assert (backends.why_no_kernel(x, block) is None) == runs
            assert backends.cuda_kernel(x, block) is None
            assert backends.choose(None, x.float(), block) == "reference"


DENSE = next(case for case in CASES if case.config.dense and case.config.kernel_size == 3)


@on_the_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_convolutions_of_many_channels(name, dtype):
    """Several chunks of hidden channels, more rows than a step has, and images of every width."""
    for k, stride, size in ((1, 1, (13, 9)), (3, 1, (30, 41)), (3, 2, (9, 70)), (5, 1, (7, 7))):
        config = BlockConfig(
            *(24, 320, 24, stride),
            expansion=False,
            kernel_size=k,
            padding=(k // 2,) * 4,
            residual=stride == 1,
            dense=True,
        )
        case = MBConvCase(config, *size, 2, between=(NO_CLIP, "silu", NO_CLIP))
        x, weights = case.inputs(dtype)
        expected = cases.expect(case, x, weights)
        y = cases.run(name, x, weights, **case.settings)
        assert (reason := cases.why_wrong(y, expected)) is None, (case, reason)


@pytest.mark.skipif("cpu" not in CPU, reason="needs the compiled extension")
def test_a_dense_convolution_gives_the_same_bits(set_threads):
    config = replace(DENSE.config, in_channels=16, hidden_channels=272, padding=(1, 0, 2, 1))
    case = replace(DENSE, config=replace(config, residual=False), height=11, width=23, batch=3)
    x, weights = case.inputs()
    set_threads(1)
    y = cases.run("cpu", x, weights, **case.settings)
    for threads in (2, 3):
        set_threads(threads)
        assert torch.equal(cases.run("cpu", x, weights, **case.settings), y)
        one = [cases.run("cpu", image[None], weights, **case.settings) for image in x]
        assert torch.equal(torch.cat(one), y)


def test_a_block_of_clips_alone_is_one_of_the_other_op():
    weights = replace(GATED.inputs()[1], gate=None, clip_expand=RELU6, clip_dw=RELU6)
    assert not isinstance(op_arguments(weights, GATED.config), MBConvArguments)
