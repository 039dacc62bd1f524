"""torch.compile and torch.export see the op as one node and trace the networks whole."""

import pytest
import torch
from cases import Case, expect, make_inputs, why_wrong
from torch._dynamo.testing import CompileCounterWithBackend

import mnv2_kernels as mk
from mnv2_kernels.block import BlockConfig

torchvision = pytest.importorskip("torchvision")

NETWORKS = {
    "torchvision": lambda: mk.fuse(torchvision.models.mobilenet_v2(width_mult=0.35)),
    "ours": lambda: mk.mobilenet_v2(0.35),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calls_of_the_op(graph: torch.fx.GraphModule) -> int:
    op = torch.ops.mnv2.inverted_residual.default
    return sum(node.target is op for node in graph.graph.nodes)


@pytest.mark.parametrize("network", NETWORKS)
@torch.inference_mode()
def test_a_network_compiles_whole_and_once(kernel_backend, network):
    model = NETWORKS[network]().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    check(compiled, model, [(2, 3, 64, 64)] * 3)
    assert counter.frame_count == 1
    assert calls_of_the_op(counter.graphs[0]) == 17


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
