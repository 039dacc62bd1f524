"""What only a GPU can show: every shape, sizes beyond 2**31, streams, graphs and memory."""

from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import cases
import pytest
import torch
from cases import LAYOUTS, LONG, Case, expect, why_wrong
from on_gpu import check_allocations, check_repeated, needs_memory, unasked
from triton_cases import DEVICE, DTYPES, dtype_name, each_dtype, make_inputs, needs_gpu, run

import mnv2_kernels as mk
from mnv2_kernels import FoldedWeights, inverted_residual
from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig

pytestmark = needs_gpu

REPEATS = 100
BLOCKS = [
    *cases.real_blocks(1.0, 56)[::3],
    *cases.efficientnet_lite0_blocks(56)[3::5],
    Case(BlockConfig(37, 75, 45, padding=(0, 1, 2, 0)), 9, 7, batch=2),
    Case(BlockConfig(20, 20, 20, expansion=False, residual=True), 8, 5, batch=3),
]
each_case = pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.id)


# Each is a compilation of some seconds, which workers share.
VALUES = [
    pytest.param(case, id=f"{group}-{case.id}")
    for group, of_group in cases.groups().items()
    for case in of_group[:: 1 if LONG else 8]
]


@each_dtype
@pytest.mark.parametrize("case", VALUES)
def test_values(case, dtype):
    x, weights = make_inputs(case, dtype)
    expected = expect(case, x, weights)
    for layout, memory_format in LAYOUTS.items():
        y = run(x.contiguous(memory_format=memory_format), weights, **case.settings)
        assert why_wrong(y, expected) is None, layout


@contextmanager
def tf32():
    """Products of float32 in TF32; triton_cases.py has it switched off."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def no_cuda_kernels(monkeypatch):
    """As if they were not in this build."""
    monkeypatch.setattr(import_module("mnv2_kernels.ops.backends"), "cuda_missing", "left out")


@each_case
def test_a_gpu_takes_triton_unasked(case, no_cuda_kernels):
    for dtype in (torch.float16, torch.bfloat16):
        assert unasked(case, dtype) == "triton"


@each_case
def test_float32_takes_triton_unasked_in_tf32_alone(case, no_cuda_kernels):
    assert unasked(case, torch.float32) == "reference"
    with tf32():
        assert unasked(case, torch.float32) == "triton"
    assert unasked(case, torch.float32) == "reference"


@each_dtype
@each_case
def test_the_same_bits_every_time(case, dtype):
    x, weights = make_inputs(case, dtype)
    first = run(x, weights, **case.settings)
    for _ in range(REPEATS):
        assert torch.equal(run(x, weights, **case.settings), first)


@each_dtype
@each_case
def test_places_in_a_batch(case, dtype):
    image, weights = make_inputs(replace(case, batch=1), dtype)
    alone = run(image, weights, **case.settings)
    for batch in (2, 3, 8, 33):
        x = torch.randn(batch, *image.shape[1:], device=DEVICE).to(dtype)
        places = sorted({0, 1, batch // 2, batch - 1})
        x[places] = image
        together = run(x, weights, **case.settings)
        assert all(torch.equal(together[i], alone[0]) for i in places), batch


def test_seventy_thousand_images():
    for dtype in DTYPES:
        check_repeated(Case(BlockConfig(16, 96, 16, residual=True), 3, 4), 70_000, dtype)


@pytest.mark.serial
def test_hidden_tensors_beyond_31_bits():
    """The expanded tensor, were there one, would hold 3.1 * 10**9 elements."""
    needs_memory(6)
    check_repeated(Case(BlockConfig(16, 960, 16), 224, 224), 64, torch.float16)


@pytest.mark.serial
@pytest.mark.parametrize("expansion", [True, False])
def test_x_beyond_31_bits(expansion):
    needs_memory(14)
    case = Case(BlockConfig(32, 32, 32, expansion=expansion), 128, 128)
    count = 2**31 // (32 * 128 * 128) + 3
    check_repeated(case, count, torch.float16)


@pytest.mark.serial
def test_one_image_beyond_31_bits():
    """2.2 * 10**9 elements in the rows of one image; rows far down are as in a small one."""
    needs_memory(14)
    height, width = 65_600, 2_048
    case = Case(BlockConfig(16, 16, 16, expansion=False), height, width)
    _, weights = make_inputs(replace(case, height=3, width=3), torch.float16)
    x = torch.zeros(1, height, width, 16, dtype=torch.float16, device=DEVICE).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[:, :, -8:, -8:] = torch.randn(1, 16, 8, 8, device=DEVICE)
    y = run(x, weights, **case.settings)
    corner = replace(case, height=9, width=9)
    expected = expect(corner, x[:, :, -9:, -9:].contiguous(), weights)
    inner = replace(expected, truth=expected.truth[:, :, 1:, 1:])
    assert why_wrong(y[:, :, -8:, -8:], inner) is None


@each_dtype
@each_case
def test_a_graph_replays_with_other_inputs(case, dtype):
    x, weights = make_inputs(case, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x, weights, **case.settings)  # Compiles.
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, weights, **case.settings)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        weights.w_dw.mul_(0.9)
        graph.replay()
        assert torch.equal(y, run(x, weights, **case.settings))


def test_side_streams():
    """A call waits for what its own stream computes, and only for that."""
    case = BLOCKS[0]
    x, weights = make_inputs(case)
    expected = run(x, weights, **case.settings)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = run(late, weights, **case.settings)
        assert not stream.query(), "the call waited for the GPU"
    torch.cuda.current_stream().wait_stream(stream)
    y.record_stream(torch.cuda.current_stream())
    assert torch.equal(y, expected)


@pytest.fixture
def no_synchronisation():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@each_case
def test_a_call_never_waits_for_the_gpu(case, no_synchronisation):
    x, weights = make_inputs(case)
    run(x, weights, **case.settings)
    torch.cuda.synchronize()
    no_synchronisation()
    for memory_format in LAYOUTS.values():
        run(x.contiguous(memory_format=memory_format), weights, **case.settings)


@each_dtype
@each_case
def test_only_the_result_is_allocated(case, dtype):
    check_allocations(run, replace(case, batch=8), dtype)


class Block(torch.nn.Module):
    def __init__(self, case: Case, weights: FoldedWeights):
        super().__init__()
        self.case, self.weights = case, weights

    def forward(self, x):
        return inverted_residual(x, self.weights, backend="triton", **self.case.settings)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_compiled(dtype):
    torch._dynamo.reset()
    case = Case(BlockConfig(24, 144, 24, residual=True), 14, 12, batch=2)
    x, weights = make_inputs(case, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(Block(case, weights), fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            other = torch.randn(batch, *x.shape[1:], device=DEVICE).to(dtype)
            other = other.contiguous(memory_format=torch.channels_last)
            expected = expect(replace(case, batch=batch), other, weights)
            assert why_wrong(compiled(other), expected) is None


def test_compiled_gradients():
    torch._dynamo.reset()
    case = Case(BlockConfig(16, 48, 16, residual=True), 8, 8, batch=2)
    x, weights = make_inputs(case)
    block = Block(case, weights)
    grads = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_float16():
    case = Case(BlockConfig(24, 144, 24, residual=True), 14, 12, batch=2)
    x, weights = make_inputs(case)
    with torch.autocast("cuda", torch.float16):
        y = run(x.half(), weights, **case.settings)
        assert run(x, weights, **case.settings).dtype == torch.float32, "as what the layers add"
    assert y.dtype == torch.float16
    expected = expect(case, x.half(), weights.to(torch.float16))
    assert why_wrong(y, expected) is None


def test_tf32_is_used_where_it_is_switched_on():
    """Ten bits of mantissa: far from float32, and near enough to the truth."""
    case = Case(BlockConfig(64, 384, 64, residual=True), 14, 14, batch=2)
    x, weights = make_inputs(case)
    ieee = run(x, weights, **case.settings)
    with tf32():
        rounded = run(x, weights, **case.settings)
    truth = expect(case, x, weights).truth
    errors = [(y.double() - truth).abs().mean().item() for y in (ieee, rounded)]
    assert 20 * errors[0] < errors[1] < 2e-3 * truth.abs().max().item()


def test_a_network_of_blocks_in_one_stream():
    """Calls follow each other without a wait, each reading what the one before wrote."""
    config = BlockConfig(24, 144, 24, residual=True)
    case = Case(config, 28, 28, batch=4, clips=(RELU6, RELU6, NO_CLIP))
    x, weights = make_inputs(case)
    y = x
    for _ in range(20):
        y = run(y, replace(weights, clip_project=(-1.0, 1.0)), **case.settings)
    again = x
    for _ in range(20):
        again = run(again, replace(weights, clip_project=(-1.0, 1.0)), **case.settings)
        torch.cuda.synchronize()
    assert torch.equal(y, again)


def test_the_other_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = BLOCKS[0]
    x, weights = make_inputs(case)
    y = run(x.to("cuda:1"), weights.to("cuda:1"), **case.settings)
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    assert why_wrong(y.to(DEVICE), expect(case, x, weights)) is None


def test_plans_are_captured_on_the_other_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = mk.mobilenet_v2(0.35).eval().half()
    x = torch.randn(2, 3, 64, 64).half()
    for device in ("cuda:0", "cuda:1"):
        planned = mk.plan(model.to(device), (3, 64, 64))
        captured = planned.capture(2)
        for image in (x, -x):
            assert torch.equal(captured(image.to(device)), planned(image.to(device)))


def test_a_plan_and_its_graph_give_what_the_model_gives():
    """Stem and last convolution are kernels of this package too; an image has its bits in both."""
    torch.manual_seed(0)
    model = mk.mobilenet_v2(0.35).eval().to(DEVICE)
    x = torch.randn(3, 3, 64, 64, device=DEVICE)
    planned = mk.plan(model, (3, 64, 64), dtype=torch.half)
    with torch.inference_mode():
        expected, y = model(x), planned(x.half())
    assert (y.float() - expected).norm() <= 0.02 * expected.norm()
    assert torch.equal(planned(x[1:2].half())[0], y[1])
    assert torch.equal(planned.capture(3)(x.half()), y)
