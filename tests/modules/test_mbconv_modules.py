"""Fused modules of blocks with curves and squeeze-excite: what runs, and from which weights."""

import pickle
from copy import deepcopy
from dataclasses import replace
from functools import partial

import cases
import pytest
import torch
from mbconv_blocks import FusedMBConv, MBConvCase, reads_as_written
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig
from mnv2_kernels.block.fold import flatten_layers, fold_layers
from mnv2_kernels.modules import compiled as compiled_blocks
from mnv2_kernels.ops import backends
from mnv2_kernels.ops.decompositions import DECOMPOSITIONS
from mnv2_kernels.ops.inverted_residual import op_arguments
from mnv2_kernels.ops.mbconv import MBConvArguments
from mnv2_kernels.recognizers.read import same_layers

pytestmark = pytest.mark.usefixtures("one_thread")
compiled = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)

LAYERS_OP = torch.ops.mnv2.mbconv_layers.default
CONFIG = BlockConfig(8, 24, 8, residual=True, squeeze_channels=6)
CASES = {
    "curves and gate": MBConvCase(CONFIG, 6, 7),
    "gate": MBConvCase(CONFIG, 6, 7, between=(RELU6, RELU6, NO_CLIP), scale="sigmoid"),
    "curves": MBConvCase(replace(CONFIG, squeeze_channels=0), 6, 7, between=("silu",) * 3),
    "t = 1": MBConvCase(
        replace(CONFIG, hidden_channels=8, expansion=False), 6, 7, between=(NO_CLIP, "gelu", RELU6)
    ),
    "dense": MBConvCase(
        replace(CONFIG, expansion=False, dense=True, squeeze_channels=0),
        *(6, 7),
        between=(NO_CLIP, RELU6, NO_CLIP),
    ),
}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    reads_as_written(monkeypatch)
    return CASES[request.param]


def close(y, truth):
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)


@compiled
def test_inference_runs_fused_and_follows_the_layers(case):
    x, plain, fused = case.inputs()[0], case.layers(), FusedMBConv(case)
    assert fused.why_plain(x) is None and fused.config == case.config
    with torch.no_grad():
        for change in (
            lambda block: None,
            lambda block: [p.mul_(1.1) for p in block.parameters()],
            lambda block: block.depthwise[1].running_var.mul_(2),
            lambda block: block.gate and nn.init.normal_(block.gate.fc2.bias),
            lambda block: setattr(block.project[1], "eps", 0.5),
        ):
            for block in (plain, fused.layers):
                torch.manual_seed(1)
                change(block)
            with cases.runs_on("cpu"):
                close(fused(x), plain(x))
            arguments = fused.folded_arguments()
            assert isinstance(arguments, MBConvArguments)
            assert all(map(lambda a, b: a is b, arguments, fused.folded_arguments()))
        assert [*fused.layers.state_dict()] == [*plain.state_dict()]
        for copy in (deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            with cases.runs_on("cpu"):
                assert torch.equal(copy(x), fused(x))
            copy.layers.project[0].weight.zero_()
            assert not torch.equal(copy(x), fused(x))


@compiled
def test_layers_run_where_their_gradients_are_needed(case):
    x, fused = case.inputs()[0], FusedMBConv(case)
    with cases.runs_on():
        assert torch.equal(fused(x), fused.layers(x))
        fused.train()
        fused(x)
    fused.eval().requires_grad_(False)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with cases.runs_on("cpu"):
        y = fused(leaves[0])
    truth = fused.layers(leaves[1])
    close(y, truth)
    close(*torch.autograd.grad(y.sum() + truth.sum(), leaves))


def test_the_reference_is_differentiable(case):
    x, fused = case.inputs()[0], FusedMBConv(case, "reference")
    parameters = [*fused.parameters()]
    with cases.runs_on("reference"):
        y = fused(x)
    grads = [torch.autograd.grad(t.square().sum(), parameters) for t in (y, fused.layers(x))]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.skipif(backends.triton.missing() is not None, reason="needs Triton")
def test_a_backend_that_is_asked_for(case):
    x, fused = case.inputs()[0], FusedMBConv(case, "triton")
    if case.config.dense:
        with pytest.raises(RuntimeError, match="'triton' cannot run here: there is no kernel for"):
            fused(x)
        return
    with torch.no_grad(), cases.runs_on("triton"):
        close(fused(x), fused.layers(x))
    with cases.runs_on():
        assert torch.equal(fused(x), fused.layers(x)), "gradients are needed"


@compiled
def test_autocast(case):
    x, fused = case.inputs()[0], FusedMBConv(case)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with cases.runs_on("cpu"):
            y = fused(x)
        truth = fused.layers(x)
    assert y.dtype == truth.dtype
    torch.testing.assert_close(y, truth, rtol=5e-2, atol=5e-2 * truth.abs().max().item())


@compiled
def test_traced(case):
    x, fused = case.inputs()[0], FusedMBConv(case)
    with torch.no_grad():
        traced = torch.jit.trace(fused, (x,), check_trace=False)
        assert "mnv2::mbconv" in str(traced.inlined_graph)
        assert torch.equal(traced(x), fused(x))
        nn.init.normal_(fused.layers.project[0].weight)
        close(traced(x), fused(x))


@compiled
def test_exported(case):
    x, fused = case.inputs()[0], FusedMBConv(case)
    batch = {0: torch.export.Dim("N", max=64)}
    exported = torch.export.export(fused, (x,), dynamic_shapes=(batch,), strict=False)
    assert [str(n.target) for n in exported.graph.nodes].count("mnv2.mbconv.default") == 1
    close(exported.module()(x[:1]), fused(x[:1]))
    decomposed = exported.run_decompositions(DECOMPOSITIONS)
    assert not any("mnv2" in str(node.target) for node in decomposed.graph.nodes)
    close(decomposed.module()(x), fused(x))


@compiled
@pytest.mark.parametrize("trains", [False, True])
def test_compiled_whole(case, trains):
    torch.compiler.reset()
    x, fused = case.inputs()[0], FusedMBConv(case)
    parameters = [*fused.parameters()]
    program = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(trains):
        for _ in range(2):
            y, truth = program(x), fused.layers(x)
            close(y, truth)
            with torch.no_grad():
                fused.layers.depthwise[0].weight.mul_(1.5)
    if trains:
        y, truth = program(x), fused.layers(x)
        grads = [torch.autograd.grad(t.square().mean(), parameters) for t in (y, truth)]
        for ours, theirs in zip(*grads, strict=True):
            bound = 1e-3 * max(1e-3, theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=bound)


@compiled
@torch.no_grad()
def test_the_op_that_folds_when_run(case, monkeypatch):
    """What a compiled program calls: it folds again after a change, and only then."""
    torch.compiler.reset()
    times, fold = [], compiled_blocks.fold_flat
    monkeypatch.setattr(compiled_blocks, "fold_flat", lambda *a: times.append(1) or fold(*a))
    x, fused = case.inputs()[0], FusedMBConv(case)
    programs = []
    program = torch.compile(fused, fullgraph=True, backend=lambda g, _: programs.append(g) or g)
    for change in (lambda: None, *(partial(p.mul_, 1.1) for p in fused.parameters())):
        change()
        program(x)
        times.clear()
        close(program(x), fused.layers(x))
        assert times == []
    (graph,) = programs
    (node,) = (n for n in graph.graph.nodes if "mbconv" in str(n.target))
    assert str(node.target) == "mnv2.mbconv_layers.default"
    tensors, present, eps = flatten_layers(fused.block_layers)
    settings = op_arguments(fold_layers(fused.block_layers), case.config)[10:]
    for layers in (tensors, [t.detach() for t in tensors]):
        arguments = (x, layers, present, eps, *settings)
        assert torch.equal(LAYERS_OP(*arguments), fused(x))
    for utility in ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"):
        opcheck(LAYERS_OP, arguments, test_utils=utility)
    counted = []
    for call in (lambda: LAYERS_OP(*arguments), lambda: fused.layers(x)):
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]
    decomposed = make_fx(lambda x: LAYERS_OP(x, *arguments[1:]), decomposition_table=DECOMPOSITIONS)
    decomposed = decomposed(x)
    assert not any("mnv2" in str(n.target) for n in decomposed.graph.nodes)
    close(decomposed(x), fused(x))


def test_two_readings_of_a_gate_are_the_same():
    layers = CASES["gate"].layers()
    first, second = layers.block_layers(), layers.block_layers()
    assert first.gate is not second.gate and same_layers([first], [second])
    other = replace(first, gate=replace(first.gate, scale="hardsigmoid"))
    assert not same_layers([first], [other])
    assert len(first.stages) == 5 and not first.is_classic
