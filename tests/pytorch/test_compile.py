"""torch.compile and torch.export see the op as one node and trace the networks whole."""

import copy
import gc

import pytest
import torch
from cases import Case, expect, make_inputs, why_wrong
from same_answers import randomise
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk
from mnv2_kernels.block.config import BlockConfig
from mnv2_kernels.block.fold import flatten_layers
from mnv2_kernels.modules import compiled as compiled_blocks

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.usefixtures("fresh_compiler")

NETWORKS = {
    "torchvision": lambda: mk.fuse(torchvision.models.mobilenet_v2(width_mult=0.35)),
    "ours": lambda: mk.mobilenet_v2(0.35),
}


OP = torch.ops.mnv2.inverted_residual.default
LAYERS_OP = torch.ops.mnv2.inverted_residual_layers.default


def calls_of_the_op(graph: torch.fx.GraphModule, op=OP) -> int:
    return sum(node.target is op for node in graph.graph.nodes)


@pytest.mark.parametrize("network", NETWORKS)
@torch.inference_mode()
def test_a_network_compiles_whole_and_once(kernel_backend, network):
    model = NETWORKS[network]().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    check(compiled, model, [(2, 3, 64, 64)] * 3)
    assert counter.frame_count == 1
    assert calls_of_the_op(counter.graphs[0], LAYERS_OP) == 17


@pytest.mark.parametrize("network", NETWORKS)
@torch.inference_mode()
def test_generated_code(kernel_backend, network):
    """Inductor, on the stem and four blocks: it takes a minute for a network."""
    start = NETWORKS[network]().eval().features[:5]
    compiled = torch.compile(start, backend="inductor", fullgraph=True)
    check(compiled, start, [(2, 3, 32, 32)] * 2)


@torch.inference_mode()
def test_dynamic_sizes_compile_thrice_at_most(kernel_backend):
    start = NETWORKS["torchvision"]().eval().features[:5]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(start, backend=counter, fullgraph=True)
    sizes = ((2, 64), (3, 64), (5, 64), (2, 96), (7, 128), (4, 160), (6, 33))
    check(compiled, start, [(batch, 3, size, size) for batch, size in sizes])
    assert counter.frame_count <= 3, "once, once more for the batch, once more for the size"


def check(compiled, model, shapes: list[tuple]) -> None:
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


def block_module(case: Case):
    x, weights = make_inputs(case)

    class Block(torch.nn.Module):
        def forward(self, x):
            return mk.inverted_residual(x, weights, **case.settings)

    return Block(), x, weights


def test_gradients_through_the_compiler(kernel_backend):
    case = Case(BlockConfig(16, 48, 16, residual=True), 8, 8, batch=2)
    block, x, weights = block_module(case)
    grads = []
    for function in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_export_of_a_block(kernel_backend):
    case = Case(BlockConfig(16, 48, 24, stride=2), 9, 8, batch=2)
    block, x, weights = block_module(case)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: batch},))
    assert calls_of_the_op(exported.graph_module) == 1
    assert why_wrong(exported.module()(x), expect(case, x, weights)) is None
    assert exported.module()(x[:1].repeat(5, 1, 1, 1)).shape == (5, 24, 5, 4)


@pytest.fixture
def blocks():
    """Three fused blocks in evaluation mode: without expansion, strided, with a residual."""
    layers = [
        TorchvisionBlock(8, 8, 1, 1),
        TorchvisionBlock(8, 16, 2, 6),
        mk.InvertedResidual(16, 16),
    ]
    return mk.fuse(randomise(torch.nn.Sequential(*layers)))


@pytest.fixture
def folded(monkeypatch) -> list:
    """One entry for each time that a compiled program folds a block."""
    times = []
    fold = compiled_blocks.fold_flat
    monkeypatch.setattr(compiled_blocks, "fold_flat", lambda *a: times.append(1) or fold(*a))
    return times


def same_as_eager(compiled, model, x) -> None:
    """But for rounding: in eager mode the blocks are one call."""
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


CHANGES = {
    "parameter": lambda m: m[1].conv[2].weight.mul_(1.5),
    "running mean": lambda m: m[2].conv[1][1].running_mean.add_(0.5),
    "bias of a norm": lambda m: m[0].conv[2].bias.add_(0.5),
    "load_state_dict": lambda m: m.load_state_dict(copy.deepcopy(randomise(m).state_dict())),
    "new data": lambda m: setattr(m[1].conv[2].weight, "data", 2 * m[1].conv[2].weight.data),
    "data in place, then eval": lambda m: m[1].conv[2].weight.data.mul_(2) is m.eval(),
    "new parameter": lambda m: setattr(
        m[1].conv[2], "weight", torch.nn.Parameter(2 * m[1].conv[2].weight)
    ),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_blocks_fold_once(kernel_backend, blocks, folded, mode):
    compiled = torch.compile(blocks, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, 9, 9)
    with mode():
        compiled(x)
        folded.clear()
        for _ in range(3):
            same_as_eager(compiled, blocks, x)
        assert not folded


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_compiled_blocks_follow_changes(kernel_backend, blocks, change):
    compiled = torch.compile(blocks, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, 9, 9)
    before = compiled(x)
    same_as_eager(compiled, blocks, x)
    CHANGES[change](blocks)
    same_as_eager(compiled, blocks, x)
    assert (compiled(x) - before).abs().max() > 1e-3


def test_compiled_blocks_follow_the_optimizer(kernel_backend, blocks):
    """A fused optimizer, which no version counts; gradients come from the folding in the graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(blocks, backend=counter, fullgraph=True)
    plain = mk.unfuse(blocks)
    x = torch.randn(2, 8, 9, 9)
    for model, call in ((plain, plain), (blocks, compiled)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for _ in range(2):
            with torch.no_grad():
                call(x)
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        same_as_eager(compiled, blocks, x)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-3, atol=1e-3)
    calls = [(calls_of_the_op(g, LAYERS_OP), calls_of_the_op(g)) for g in counter.graphs]
    assert calls == [(3, 0), (0, 3)]


@torch.no_grad()
def test_compiled_blocks_under_autocast(kernel_backend, blocks):
    compiled = torch.compile(blocks, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, 9, 9)
    same_as_eager(compiled, blocks, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        assert y.dtype == blocks(x).dtype
        torch.testing.assert_close(y, blocks(x), rtol=2e-2, atol=5e-2)
    same_as_eager(compiled, blocks, x)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_x_through_compiled_blocks(kernel_backend, blocks, frozen):
    blocks.requires_grad_(not frozen)
    compiled = torch.compile(blocks, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, 9, 9)
    gradients = []
    for model in (blocks, compiled):
        image = x.clone().requires_grad_()
        model(image).square().sum().backward()
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@inductor_config.patch(freezing=True)
def test_freezing_folds_constants(kernel_backend, blocks):
    """Inductor's freezing does the folding itself, so that it must be in the graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(blocks, backend=counter, fullgraph=True)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(compiled(x), blocks(x), rtol=1e-4, atol=1e-4)
    assert [calls_of_the_op(g) for g in counter.graphs] == [3]


@torch.no_grad()
def test_what_is_kept_of_a_block_goes_with_it(kernel_backend, blocks):
    compiled = torch.compile(blocks, backend="aot_eager", fullgraph=True)
    gc.collect()  # What other tests have left.
    before = len(compiled_blocks._cache)
    compiled(torch.randn(2, 8, 9, 9))
    assert len(compiled_blocks._cache) == before + 3
    x = torch.randn(2, 8, 9, 9)
    for block in blocks:
        conv = block.block_layers.project.conv
        conv.weight = torch.nn.Parameter(torch.ones_like(conv.weight))
        x = block(x)
    del compiled
    torch._dynamo.reset()
    gc.collect()
    assert len(compiled_blocks._cache) == before


def flops(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def layers_arguments(module, x) -> tuple:
    block = module.block_layers
    c = block.config
    settings = (c.stride, c.padding, c.dilation, c.residual)
    return (x, *flatten_layers(block), *settings, *block.clips)


@torch.no_grad()
def test_opcheck_of_the_layers_op(kernel_backend, blocks):
    x = torch.randn(2, 8, 9, 9)
    for module in blocks:
        arguments = layers_arguments(module, x)
        detached = (x, [t.detach() for t in arguments[1]], *arguments[2:])
        for utility in ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"):
            opcheck(LAYERS_OP, detached, test_utils=utility)
        y = module(x)
        assert torch.equal(LAYERS_OP(*arguments), y)
        assert flops(LAYERS_OP, *arguments) == flops(module, x) > 0
        x = y


@torch.no_grad()
def test_layers_that_are_no_parameters_are_never_kept(kernel_backend, blocks):
    """Constants of a program, whose memory may be written to without being counted."""
    x = torch.randn(2, 8, 9, 9)
    arguments = layers_arguments(blocks[1], x)
    copies = [t.detach().clone() for t in arguments[1]]
    before = LAYERS_OP(x, copies, *arguments[2:])
    for tensor in copies:
        tensor.data.mul_(1.5)
    after = LAYERS_OP(x, copies, *arguments[2:])
    assert (after - before).abs().max() > 1e-2
    assert all(t is not key for t in copies for key in compiled_blocks._cache)


@torch.no_grad()
def test_strict_export_decomposes(kernel_backend, blocks):
    from mnv2_kernels.ops.decompositions import DECOMPOSITIONS

    x = torch.randn(2, 8, 9, 9)
    program = torch.export.export(blocks, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), blocks(x), rtol=1e-4, atol=1e-4)
    program = program.run_decompositions(DECOMPOSITIONS)
    assert "mnv2" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), blocks(x), rtol=1e-4, atol=1e-4)
