"""torch.compile looks into the Triton op: the graph holds the kernel, not a call it cannot see.

Traced on fake CUDA tensors, which need no GPU; Triton gets a driver that only names one.
"""

import pytest
import torch
import triton
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from triton.backends.compiler import GPUTarget
from triton_cases import DTYPES, HAS_GPU

from mnv2_kernels.block.config import NO_CLIP, RELU6
from mnv2_kernels.ops.triton.kernels import gate
from mnv2_kernels.ops.triton.kernels.patch import inverted_residual_patch

TRITON = torch.ops.mnv2.inverted_residual_triton.default
MBCONV = torch.ops.mnv2.mbconv_triton.default
SHAPES = ((2, 8, 6, 7), (8, 24), (24,), (3, 3, 24), (24,), (24, 8), (8,))
GATED_SHAPES = (*SHAPES, (24, 6), (6,), (6, 24), (24,))
SILU = ((2, 2, 0, 2), (*NO_CLIP,) * 4, 0)
# Which sizes of x are symbols.
DYNAMIC = {"static": (), "batch": (0,), "size": (2, 3), "batch and size": (0, 2, 3)}


class Driver:
    """As much of a GPU as analysing a kernel's source needs."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def a_gpu_to_compile_for():
    if HAS_GPU:
        yield
        return
    before = triton.runtime.driver._active
    triton.runtime.driver._active = Driver()
    yield
    triton.runtime.driver._active = before


class Block(torch.nn.Module):
    def __init__(self, op, between=(RELU6, RELU6, NO_CLIP)):
        super().__init__()
        self.op, self.between = op, between

    def forward(self, *tensors):
        return (self.op(*tensors, 1, (1, 1, 1, 1), 1, True, *self.between),)


def fake_tensors(
    dynamic: tuple[int, ...], dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> list[torch.Tensor]:
    """x in channels_last with symbols for these sizes, and weights, on a GPU that need not be."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    kinds = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(4)]
    context = StatelessSymbolicContext(dynamic_sizes=kinds)
    shape = mode.from_tensor(torch.empty(shapes[0]), symbolic_context=context).shape
    with mode:
        channels_last = torch.channels_last
        x = torch.empty(shape, dtype=dtype, device="cuda", memory_format=channels_last)
        types = [dtype if len(s) > 1 else torch.float32 for s in shapes[1:]]
        rest = zip(shapes[1:], types, strict=True)
        return [x, *(torch.empty(s, dtype=t, device="cuda") for s, t in rest)]


def trace(op, dynamic: tuple[int, ...] = (), dtype: torch.dtype = torch.float32):
    graph, _ = aot_export_module(Block(op), fake_tensors(dynamic, dtype), trace_joint=False)
    return graph.graph


def launches(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if n.target is triton_kernel_wrapper_functional]


def kernel_of(launch: torch.fx.Node):
    """torch wraps a launch with num_warps in one choice of an autotuner."""
    kernel = kernel_side_table.get_kernel(launch.kwargs["kernel_idx"])
    return kernel.fn if hasattr(kernel, "configs") else kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dynamic", DYNAMIC.values(), ids=DYNAMIC)
def test_the_graph_holds_the_kernel(dynamic, dtype):
    graph = trace(TRITON, dynamic, dtype)
    (launch,) = launches(graph)
    assert kernel_of(launch) is inverted_residual_patch
    assert not [n for n in graph.nodes if "inverted_residual_triton" in str(n.target)]
    (output,) = graph.output_node().args[0]
    assert output.meta["val"].dtype == dtype
    assert output.meta["val"].stride()[1] == 1, "channels_last"


@pytest.mark.parametrize("dynamic", DYNAMIC.values(), ids=DYNAMIC)
def test_sizes_and_the_grid_are_symbols(dynamic):
    (launch,) = launches(trace(TRITON, dynamic))
    kwargs = launch.kwargs["kwargs"]
    sizes = {name: isinstance(kwargs[name], int) for name in ("H", "W", "H_out", "W_out")}
    assert set(sizes.values()) == {2 not in dynamic}
    assert isinstance(kwargs["patches"], int) == (not dynamic)
    ((programs, *ones),) = launch.kwargs["grid"]
    assert ones == [1, 1] and isinstance(programs, int) == (not dynamic)


def test_only_the_result_is_written():
    """What the compiler reads out of the kernel: nothing else has to be copied before it runs."""
    for dtype in DTYPES:
        (launch,) = launches(trace(TRITON, (), dtype))
        assert launch.kwargs["tensors_to_clone"] == ["y"]


def test_symbols_cost_no_guard_but_of_the_layout():
    """A second batch or size must not compile again."""
    tensors = fake_tensors((0, 2, 3), torch.float32)
    env = tensors[0].fake_mode.shape_env
    aot_export_module(Block(TRITON), tensors, trace_joint=False)
    symbols = {str(s) for s in tensors[0].shape if not isinstance(s, int)}
    assert len(symbols) == 3 and not env.replacements, "a size was fixed or equated"
    expressions = [s.node.expr for s in tensors[0].shape if not isinstance(s, int)]
    for sizes in ((2, 6, 7), (5, 6, 7), (64, 112, 96)):
        values = dict(zip(expressions, sizes, strict=True))
        refused = [g.expr for g in env.guards if not bool(g.expr.subs(values))]
        assert not refused, sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dynamic", DYNAMIC.values(), ids=DYNAMIC)
def test_the_graph_holds_the_kernels_around_a_gate(dynamic, dtype):
    tensors = fake_tensors(dynamic, dtype, GATED_SHAPES)
    graph, _ = aot_export_module(Block(MBCONV, SILU), tensors, trace_joint=False)
    found = launches(graph.graph)
    kernels = [gate.depthwise_sums, gate.excitation, gate.gated_projection]
    assert [kernel_of(launch) for launch in found] == kernels
    written = [{"kept", "sums"}, {"gate"}, {"y"}]
    assert [set(launch.kwargs["tensors_to_clone"]) for launch in found] == written
    known = [isinstance(launch.kwargs["grid"][0][0], int) for launch in found]
    assert known == [not dynamic, 0 not in dynamic, not dynamic]
    assert not [n for n in graph.graph.nodes if "mbconv_triton" in str(n.target)]


def test_the_graph_of_a_block_with_curves_alone_holds_the_patch_kernel():
    tensors = [*fake_tensors((), torch.float16), *(None,) * 4]
    graph, _ = aot_export_module(Block(MBCONV, SILU), tensors, trace_joint=False)
    (launch,) = launches(graph.graph)
    assert kernel_of(launch) is inverted_residual_patch
