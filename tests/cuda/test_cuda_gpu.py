"""What only a GPU can show of the CUDA kernels: every shape, sizes beyond 2**31, streams, graphs,
memory. The emulator (test_cuda_kernels.py) sees races and addresses, which a GPU does not show.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module

import cases
import pytest
import torch
from cases import LAYOUTS, Case, expect, why_wrong
from cuda_calls import arguments, blocks_of, kernel_of, odd_view
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_gpu import GIB, check_allocations, check_repeated, needs_memory, unasked
from random_calls import calls, layouts
from torch.library import opcheck
from triton_cases import DEVICE, DTYPES, HAS_GPU, dtype_name, make_inputs

from mnv2_kernels import InvertedResidual, fuse, inverted_residual
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig
from mnv2_kernels.ops.extension import cuda_missing

WHY_NOT = cuda_missing or (
    None if HAS_GPU else "there is no NVIDIA GPU of compute capability 8.0 or later"
)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

REPEATS = 100
OP = torch.ops.mnv2.inverted_residual.default
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
KERNEL_DTYPES = [("patch", HALF), ("patch", BFLOAT), ("tile", HALF), ("tile", BFLOAT)]
KERNEL_DTYPES += [("generic", dtype) for dtype in DTYPES]
each_kernel = pytest.mark.parametrize(
    ("kernel", "dtype"), KERNEL_DTYPES, ids=lambda v: v if isinstance(v, str) else dtype_name(v)
)
# Of every kernel a few blocks that are different in kind.
CLOSE = {
    "patch": [
        Case(BlockConfig(16, 96, 24, stride=2), 112, 112),
        Case(BlockConfig(24, 144, 24, residual=True), 56, 56),
        Case(BlockConfig(32, 192, 32, residual=True), 28, 28, clips=(RELU, RELU, NO_CLIP)),
        Case(BlockConfig(8, 40, 32, padding=(0, 1, 2, 0)), 45, 23),
    ],
    "tile": [
        Case(BlockConfig(32, 32, 16, expansion=False), 112, 112),
        Case(BlockConfig(32, 192, 64, stride=2), 28, 28),
        Case(BlockConfig(64, 384, 64, residual=True), 14, 14),
        Case(BlockConfig(160, 960, 320), 7, 7),
        Case(BlockConfig(40, 240, 40, kernel_size=5, padding=(2,) * 4, residual=True), 13, 9),
    ],
    "generic": [
        Case(BlockConfig(37, 75, 45, padding=(0, 1, 2, 0)), 9, 7),
        Case(BlockConfig(20, 20, 20, expansion=False, residual=True), 8, 5),
        Case(BlockConfig(5, 19, 7, stride=2), 30, 31),
    ],
}
CLOSE_CASES = [
    pytest.param(case, dtype, id=f"{kernel}-{dtype_name(dtype)}-{case.id}")
    for kernel, dtype in KERNEL_DTYPES
    for case in CLOSE[kernel]
]
each_case = pytest.mark.parametrize(("case", "dtype"), CLOSE_CASES)
run = partial(cases.run, "cuda")


@each_kernel
def test_values(kernel, dtype):
    failures = []
    blocks = blocks_of(kernel, dtype)
    for case in blocks:
        x, weights = make_inputs(case, dtype)
        expected = expect(case, x, weights)
        for layout, memory_format in LAYOUTS.items():
            y = run(x.contiguous(memory_format=memory_format), weights, **case.settings)
            if reason := why_wrong(y, expected):
                failures.append(f"{case.id} {layout}: {reason}")
    assert not failures, f"{len(failures)} of {2 * len(blocks)}:\n" + "\n".join(failures[:20])


@each_kernel
def test_the_blocks_looked_at_closely_are_those_of_the_kernel(kernel, dtype):
    if dtype != SINGLE:
        assert {kernel_of(case, dtype) for case in CLOSE[kernel]} == {kernel}


@each_case
def test_what_a_gpu_takes_unasked(case, dtype, monkeypatch):
    declines = dtype == SINGLE or kernel_of(case, dtype) == "generic"
    by_itself = {SINGLE: "reference"}.get(dtype, "triton") if declines else "cuda"
    assert unasked(case, dtype) == by_itself
    backends = import_module("mnv2_kernels.ops.backends")
    monkeypatch.setattr(backends.triton, "missing", "left out")
    assert unasked(case, dtype) == "cuda"


@each_case
def test_the_op_is_this_kernel(case, dtype):
    x, weights = make_inputs(case, dtype)
    y = OP(*arguments(x, weights, case))
    assert torch.equal(y, run(x, weights, **case.settings))


@each_case
def test_the_same_bits_every_time(case, dtype):
    case = replace(case, batch=5)
    x, weights = make_inputs(case, dtype)
    first = run(x, weights, **case.settings)
    for _ in range(REPEATS):
        assert torch.equal(run(x, weights, **case.settings), first)


@each_case
def test_places_in_a_batch(case, dtype):
    image, weights = make_inputs(case, dtype)
    alone = run(image, weights, **case.settings)
    assert why_wrong(alone, expect(case, image, weights)) is None
    for batch in (2, 3, 8, 33, 257):
        x = torch.randn(batch, *image.shape[1:], device=DEVICE).to(dtype)
        places = sorted({0, 1, batch // 2, batch - 1})
        x[places] = image
        together = run(x, weights, **case.settings)
        assert all(torch.equal(together[i], alone[0]) for i in places), batch


@each_case
def test_no_images(case, dtype):
    x, weights = make_inputs(replace(case, batch=1), dtype)
    y = run(x[:0], weights, **case.settings)
    assert y.shape[0] == 0 and y.shape[1] == case.config.out_channels


def tensors_of(case: Case) -> list[int]:
    """Which of the op's tensors (x, six weights) such a call has."""
    expand, depthwise, project = case.biases
    expansion = case.config.expansion
    present = (True, expansion, expansion and expand, True, depthwise, True, project)
    return [i for i, there in enumerate(present) if there]


@pytest.mark.parametrize(
    ("case", "dtype", "odd"),
    [
        pytest.param(*of.values, odd, id=f"{of.id}-{odd}")
        for of in CLOSE_CASES
        for odd in tensors_of(of.values[0])
    ],
)
def test_a_view_may_begin_anywhere(case, dtype, odd):
    x, weights = make_inputs(replace(case, batch=2), dtype)
    args = list(arguments(x.contiguous(memory_format=torch.channels_last), weights, case))
    expected = OP(*args)
    args[odd] = odd_view(args[odd])
    assert torch.equal(OP(*args), expected)


@each_case
def test_biases_of_the_dtype_of_x(case, dtype):
    x, weights = make_inputs(case, dtype)
    rounded = weights.to(dtype)
    y = run(x, rounded, **case.settings)
    assert why_wrong(y, expect(case, x, rounded)) is None


def test_what_is_refused():
    x, weights = make_inputs(CLOSE["generic"][0], SINGLE)
    settings = CLOSE["generic"][0].settings
    with pytest.raises(RuntimeError, match="must be float32, float16 or bfloat16, got torch.float"):
        run(x.double(), weights.to(torch.float64), **settings)
    args = arguments(x, weights, CLOSE["generic"][0])
    with pytest.raises(ValueError, match="w_expand must be on the device of x, cuda:0, got cpu"):
        OP(x, weights.w_expand.cpu(), *args[2:])
    with pytest.raises(ValueError, match="w_expand must be on the device of x, cpu, got cuda:0"):
        OP(x.cpu(), *args[1:])


@settings(
    max_examples=1000,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=calls(), layout=layouts(), dtype=st.sampled_from(DTYPES))
def check_call(ran, case, layout, dtype):
    x, weights = make_inputs(case, dtype)
    expected = expect(case, x, weights)
    with DEVICE:
        x = layout(x)
    assert (reason := why_wrong(run(x, weights, **case.settings), expected)) is None, (
        f"{case}: {reason}"
    )
    ran[dtype] += 1


def test_random_calls():
    ran = Counter()
    check_call(ran)
    assert ran.total() >= 1000 and min(ran[dtype] for dtype in DTYPES) >= 200, ran


# ---- Streams, graphs, memory


@each_case
def test_a_graph_replays_with_other_inputs(case, dtype):
    x, weights = make_inputs(replace(case, batch=3), dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x, weights, **case.settings)  # Loads the kernel.
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, weights, **case.settings)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        weights.w_dw.mul_(0.9)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, run(x, weights, **case.settings))


@pytest.mark.serial  # The GPU sleeps for a time that the calls must not take.
@each_case
def test_a_call_waits_for_its_own_stream_and_for_no_gpu(case, dtype):
    x, weights = make_inputs(replace(case, batch=2), dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = run(x, weights, **case.settings)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), no_synchronisation():
        late = torch.zeros_like(x)
        # Memory for the result is there then: to get it can wait for the GPU.
        run(late, weights, **case.settings)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = run(late, weights, **case.settings)
        assert not stream.query(), "the call waited for the GPU"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


@contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_case
def test_only_the_result_is_allocated(case, dtype):
    check_allocations(run, replace(case, batch=8), dtype)


def test_a_network_of_blocks_in_one_stream():
    """Calls follow each other without a wait, each reading what the one before wrote."""
    for case in (CLOSE["patch"][1], CLOSE["tile"][2]):
        x, weights = make_inputs(replace(case, batch=4), HALF)
        weights = replace(weights, clip_project=(-1.0, 1.0))
        results = []
        for wait in (lambda: None, torch.cuda.synchronize):
            y = x
            for _ in range(20):
                y = run(y, weights, **case.settings)
                wait()
            results.append(y)
        assert torch.equal(*results)


def test_the_other_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for case, dtype in ((CLOSE["patch"][0], HALF), (CLOSE["generic"][0], SINGLE)):
        x, weights = make_inputs(case, dtype)
        y = run(x.to("cuda:1"), weights.to("cuda:1"), **case.settings)
        assert y.device.index == 1 and torch.cuda.current_device() == 0
        assert why_wrong(y.to(DEVICE), expect(case, x, weights)) is None


# ---- Beyond 2**31


def test_seventy_thousand_images():
    small = Case(BlockConfig(16, 96, 16, residual=True), 3, 4)
    check_repeated(small, 70_000, HALF, run)
    check_repeated(Case(BlockConfig(5, 19, 5, residual=True), 3, 4), 70_000, SINGLE, run)


@pytest.mark.serial
@pytest.mark.parametrize("kernel", CLOSE)
def test_x_and_y_beyond_31_bits(kernel):
    config, size = {
        "patch": (BlockConfig(32, 32, 32), 128),
        "tile": (BlockConfig(128, 128, 128, residual=True), 16),
        "generic": (BlockConfig(33, 7, 33, residual=True), 64),
    }[kernel]
    needs_memory(14)
    case = Case(config, size, size)
    assert kernel_of(case, HALF) == kernel
    check_repeated(case, 2**31 // (config.in_channels * size * size) + 3, HALF, run)


@pytest.mark.serial
@pytest.mark.parametrize("kernel", CLOSE)
def test_one_image_beyond_31_bits(kernel):
    """Rows far down in one image are as in a small one."""
    needs_memory(18)
    config, width = {
        "patch": (BlockConfig(16, 16, 8), 2_048),
        "tile": (BlockConfig(16, 16, 8, expansion=False), 2_048),
        "generic": (BlockConfig(17, 17, 5, expansion=False), 2_048),
    }[kernel]
    height = 2**31 // (config.in_channels * width) + 64
    case = Case(config, height, width)
    assert kernel_of(case, HALF) == kernel
    _, weights = make_inputs(replace(case, height=3, width=3), HALF)
    c_in = config.in_channels
    x = torch.zeros(1, height, width, c_in, dtype=HALF, device=DEVICE).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[:, :, -8:, -8:] = torch.randn(1, c_in, 8, 8, device=DEVICE)
    y = run(x, weights, **case.settings)
    corner = replace(case, height=9, width=9)
    expected = expect(corner, x[:, :, -9:, -9:].contiguous(), weights)
    inner = replace(expected, truth=expected.truth[:, :, 1:, 1:])
    assert why_wrong(y[:, :, -8:, -8:], inner) is None


@pytest.mark.serial
def test_hidden_tensors_beyond_31_bits():
    """The expanded tensor, were there one, would hold 3.1 * 10**9 elements."""
    needs_memory(6)
    check_repeated(Case(BlockConfig(16, 960, 16), 224, 224), 64, HALF, run)
    assert torch.cuda.max_memory_allocated() < 60 * GIB


# ---- What PyTorch does around a call


def test_autocast_computes_in_the_dtype_asked_for():
    case = CLOSE["tile"][2]
    x, weights = make_inputs(case, SINGLE)
    for dtype in (HALF, BFLOAT):
        with torch.autocast("cuda", dtype):
            y = run(x, weights, **case.settings)
        assert y.dtype == dtype
        assert why_wrong(y, expect(case, x.to(dtype), weights.to(dtype))) is None


def test_gradients_are_those_of_the_reference():
    names = ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")
    members = cases.groups()["S4"][:40]
    for case in members:
        x, weights = make_inputs(case, SINGLE)
        grads = []
        for backend in ("cuda", "reference"):
            leaves = [None if t is None else t.clone().requires_grad_() for t in weights.tensors()]
            own = replace(weights, **dict(zip(names, leaves, strict=True)))
            image = x.clone().requires_grad_()
            y = inverted_residual(image, own, backend=backend, **case.settings)
            given = [image, *(t for t in leaves if t is not None)]
            grads.append(torch.autograd.grad(y.square().sum(), given))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_case
def test_opcheck(case, dtype):
    """Schema, fake kernel, gradients and AOT autograd, on tensors of the device."""
    x, weights = make_inputs(case, dtype)
    opcheck(OP, arguments(x, weights, case))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=dtype_name)
def test_compiled(dtype):
    torch._dynamo.reset()
    block = fuse(InvertedResidual(24, 24).eval(), backend="cuda").to(DEVICE, dtype)
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        for batch, size in ((2, 28), (3, 28), (3, 36), (1, 7)):
            x = torch.randn(batch, 24, size, size, device=DEVICE).to(dtype)
            # The compiler folds the weights itself.
            torch.testing.assert_close(compiled(x), block(x), rtol=2e-2, atol=2e-2)


def test_special_values_reach_the_result():
    """NaN and infinity of x are in the pixels that read them, whatever clips lie between."""
    for kernel, blocks in CLOSE.items():
        case = replace(blocks[0], clips=(RELU6, RELU6, NO_CLIP))
        x, weights = make_inputs(case, HALF)
        x[0, 1, case.height // 2, case.width // 2] = float("nan")
        y = run(x, weights, **case.settings)
        truth = expect(case, x, weights).truth
        assert torch.equal(y.isnan(), truth.isnan()) and y.isnan().any(), kernel
