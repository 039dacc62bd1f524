"""What PyTorch is told about the op: schema, fake kernel, autocast, FLOPs, vmap; and the GIL."""

import threading
import time
from dataclasses import replace
from math import inf

import cases
import pytest
import torch
from cases import make_inputs, run
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mnv2_kernels import inverted_residual
from mnv2_kernels.block.config import BlockConfig
from mnv2_kernels.ops import reference

pytestmark = [pytest.mark.sampled(2), pytest.mark.usefixtures("kernel_backend")]

OP = torch.ops.mnv2.inverted_residual.default
BACKWARD = torch.ops.mnv2.inverted_residual_backward.default
SAMPLES = [case for case in cases.groups()["S4"] if case.batch != 1][:40]
each_utility = pytest.mark.parametrize(
    "utility",
    ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"],
)


def arguments(case: cases.Case, requires_grad: bool = False) -> tuple:
    x, weights = make_inputs(case)
    tensors = [x.to(memory_format=torch.channels_last), *weights.tensors()]
    if requires_grad:
        tensors = [t if t is None else t.requires_grad_() for t in tensors]
    return *tensors, *case.settings.values(), *weights.clips()


@each_utility
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(utility, requires_grad):
    assert len(SAMPLES) == 40
    for case in SAMPLES:
        opcheck(OP, arguments(case, requires_grad), test_utils=utility)


@each_utility
def test_opcheck_of_backward(utility):
    for i, case in enumerate(SAMPLES):
        args = arguments(case)
        grad_y = torch.randn_like(OP(*args))
        needs_grad = [t is not None and (i >> bit) % 2 == 0 for bit, t in enumerate(args[:7])]
        opcheck(BACKWARD, (grad_y, *args, needs_grad), test_utils=utility)


def test_vmap_is_refused():
    args = arguments(SAMPLES[0])
    with pytest.raises(NotImplementedError, match="vmap is not supported"):
        torch.vmap(lambda x: OP(x, *args[1:]))(torch.stack([args[0]] * 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_the_cpu_is_in_the_dtype_asked_for(dtype):
    """As the layers: they compute in it, and what they add to a float32 x is float32."""
    added = 0
    for case in cases.groups()["S4"]:
        x, weights = make_inputs(case)
        biases = {n: getattr(weights, n) for n in ("b_expand", "b_dw", "b_project")}
        cast = replace(weights.to(dtype), **biases)
        for image in (x, x.to(dtype)):
            with torch.autocast("cpu", dtype):
                y = run("cpu", image, weights, **case.settings)
                half_biases = run("cpu", image, weights.to(torch.float16), **case.settings)
                layers = reference.inverted_residual(image, weights, **case.settings)
                assert torch.equal(run("reference", image, weights, **case.settings), layers)
            assert y.dtype == half_biases.dtype == layers.dtype, case.id
            assert y.numel() == 0 or y.is_contiguous(memory_format=torch.channels_last)
            settings = case.settings
            if y.dtype == torch.float32:
                added += 1
                rest = run("cpu", image.to(dtype), cast, **settings | {"residual": False}) + image
            else:
                rest = run("cpu", image.to(dtype), cast, **settings)
            assert torch.equal(y, rest), case.id
    assert added >= 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bad_calls_inside_autocast(dtype):
    case = cases.Case(BlockConfig(8, 24, 9), 5, 6)
    x, weights = make_inputs(case)
    mixed = replace(weights, w_dw=weights.w_dw.double())
    for backend in cases.backends():
        with torch.autocast("cpu", dtype):
            with pytest.raises(ValueError, match="residual needs x and the result to have one"):
                run(backend, x, weights, residual=True)
            with pytest.raises(TypeError, match="w_dw must have the dtype of x"):
                run(backend, x, mixed)


def test_flops_are_those_of_the_convolutions():
    for case in SAMPLES:
        x, weights = make_inputs(case)
        counted = []
        for backend in ("cpu", "reference"):
            with FlopCounterMode(display=False) as counter:
                inverted_residual(x, weights, backend=backend, **case.settings)
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] and (counted[0] > 0 or case.batch == 0), case.id


def test_parameters_and_subclasses_are_tensors_too():
    class Marked(torch.Tensor):
        pass

    case = SAMPLES[1]
    x, weights = make_inputs(case)
    y = run("cpu", x, weights, **case.settings)
    marked = run("cpu", x.as_subclass(Marked), weights, **case.settings)
    assert type(marked) is Marked and torch.equal(marked, y)
    with torch.no_grad():
        assert torch.equal(run("cpu", torch.nn.Parameter(x), weights, **case.settings), y)


def test_other_threads_run_python_during_a_call():
    case = cases.Case(BlockConfig(64, 384, 64), 56, 56, batch=64)
    x, weights = make_inputs(case)
    x = x.contiguous(memory_format=torch.channels_last)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    run("cpu", x, weights, **case.settings)
    end = time.perf_counter()
    done.set()
    ticker.join()
    within = [t for t in ticks if begin < t < end]
    # The interpreter takes the lock from a thread every 5 ms at most; held, it gives no tick.
    assert len(within) >= 10 and end - within[-1] < (end - begin) / 2, (len(within), end - begin)


@pytest.mark.parametrize("name", ("inverted_residual", "inverted_residual_triton"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_autocast_on_a_gpu_is_in_the_dtype_asked_for(name, dtype):
    op = getattr(torch.ops.mnv2, name).default
    clips = ([0.0, 6.0], [0.0, 6.0], [-inf, inf])
    with FakeTensorMode():
        shapes = ((1, 8, 5, 6), (8, 16), (16,), (3, 3, 16), (16,), (16, 8), (8,))
        tensors = [torch.empty(shape, device="cuda") for shape in shapes]
        added, alone = ((*tensors, 1, [1] * 4, 1, flag, *clips) for flag in (True, False))
        assert op(*alone).dtype == torch.float32
        before = torch.get_autocast_dtype("cuda")
        # torch.autocast("cuda") switches itself off where there is no GPU.
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            assert op(*alone).dtype == op(tensors[0].to(dtype), *added[1:]).dtype == dtype
            assert op(*added).dtype == torch.float32, "as the layers add to a float32 x"
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)
