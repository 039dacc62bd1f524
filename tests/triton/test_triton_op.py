"""The Triton twin of the op: what PyTorch is told, bad calls, gradients, and who chooses it."""

from dataclasses import replace

import cases
import pytest
import torch
from bad_calls import BAD_CALLS, NAMES, call_reference, fill, good_call
from cases import Case
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from triton_cases import DEVICE, DTYPES, HAS_GPU, QUICK, each_dtype, make_inputs, run, steps

import mnv2_kernels as mk
from mnv2_kernels import inverted_residual
from mnv2_kernels.block.config import BlockConfig
from mnv2_kernels.ops.backends import BACKENDS

pytestmark = pytest.mark.sampled(2)

OP = torch.ops.mnv2.inverted_residual_triton.default
BLOCK = Case(BlockConfig(6, 20, 6, residual=True), 3, 4, batch=2)
SAMPLES = [
    BLOCK,
    *[c for c in cases.groups()["S4"] if c.batch != 1 and steps(replace(c, batch=1), QUICK) < 400][
        :15:3
    ],
]
each_utility = pytest.mark.parametrize(
    "utility",
    ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"],
)


def arguments(case: Case, requires_grad: bool = False, dtype=torch.float32) -> tuple:
    x, weights = make_inputs(case, dtype)
    tensors = [x.to(memory_format=torch.channels_last), *weights.tensors()]
    if requires_grad:
        tensors = [t if t is None else t.requires_grad_() for t in tensors]
    return *tensors, *case.settings.values(), *weights.clips()


@each_utility
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(utility, requires_grad):
    assert len(SAMPLES) >= 4
    samples = SAMPLES[: 1 if requires_grad else None]
    for case in samples:
        opcheck(OP, arguments(case, requires_grad), test_utils=utility)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_opcheck_in_half_precision(dtype):
    opcheck(OP, arguments(BLOCK, dtype=dtype), test_utils=("test_schema", "test_faketensor"))


def test_bad_calls():
    """The table of the main op, the same sentences."""

    def call(arguments: dict) -> torch.Tensor:
        on_device = (v.to(DEVICE) if torch.is_tensor(v) else v for v in arguments.values())
        return OP(*on_device)

    wrong = []
    for error, sentence, changes in BAD_CALLS:
        try:
            call(good_call() | fill(changes))
            wrong.append(f"accepted: {sentence}")
        except error as raised:
            if not str(raised).startswith(f"inverted_residual: {sentence}"):
                wrong.append(f"{raised}\n  expected: {sentence}")
        except Exception as raised:
            wrong.append(f"{type(raised).__name__}: {raised}\n  expected: {sentence}")
    assert not wrong, f"{len(wrong)} of {len(BAD_CALLS)}:\n" + "\n".join(wrong)
    good = call(good_call())
    torch.testing.assert_close(good.cpu(), call_reference(good_call()))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_two_devices(name):
    call = good_call()
    call[name] = call[name].to("meta")
    named = "w_expand" if name == "x" else name
    with pytest.raises(ValueError, match=f"^inverted_residual: {named} must be on the device of x"):
        OP(*call.values())


def test_gradients_are_those_of_the_reference():
    x, weights = make_inputs(BLOCK)
    grads = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *weights.tensors())]
        names = ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")
        own = replace(weights, **dict(zip(names, leaves[1:], strict=True)))
        y = inverted_residual(leaves[0], own, backend=backend, **BLOCK.settings)
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_second_derivatives_and_vmap_are_refused():
    args = arguments(BLOCK, requires_grad=True)
    (grad,) = torch.autograd.grad(OP(*args).square().sum(), args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    args = arguments(BLOCK)
    with pytest.raises(NotImplementedError, match="vmap is not supported"):
        torch.vmap(lambda x: OP(x, *args[1:]))(torch.stack([args[0]] * 2))


@pytest.mark.skipif(HAS_GPU, reason="autocast of the CPU: test_triton_gpu.py has the GPU's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_the_cpu_is_in_the_dtype_asked_for(dtype):
    x, weights = make_inputs(BLOCK, dtype)
    wide = weights.to(torch.float32)
    with torch.autocast("cpu", dtype):
        y = run(x, wide, **BLOCK.settings)
        added = run(x.float(), wide, **BLOCK.settings)
    assert torch.equal(y, run(x, weights, **BLOCK.settings))
    assert torch.equal(added, run(x, weights, **BLOCK.settings | {"residual": False}) + x.float())


def test_flops_are_those_of_the_main_op():
    for case in SAMPLES:
        args = [t.to("meta") if torch.is_tensor(t) else t for t in arguments(case)]
        counted = []
        for op in (OP, torch.ops.mnv2.inverted_residual.default):
            with FlopCounterMode(display=False) as counter:
                op(*args)
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] and (counted[0] > 0 or case.batch == 0), case.id


@each_dtype
def test_the_result_is_what_the_fake_kernel_says(dtype):
    for case in SAMPLES:
        args = arguments(case, dtype=dtype)
        if case.batch > 1 and case is not BLOCK:
            args = (args[0][:1], *args[1:])
        y, fake = OP(*args), OP(*(t.to("meta") if torch.is_tensor(t) else t for t in args))
        assert (y.shape, y.stride(), y.dtype) == (fake.shape, fake.stride(), fake.dtype), case.id
        assert y.numel() == 0 or y.is_contiguous(memory_format=torch.channels_last)


def test_forward_mode_goes_to_the_reference():
    x, weights = make_inputs(BLOCK)

    def call(backend: str):
        return lambda x: inverted_residual(x, weights, backend=backend, **BLOCK.settings)

    tangent = torch.randn_like(x)
    ours, theirs = (
        torch.func.jvp(call(name), (x,), (tangent,)) for name in ("triton", "reference")
    )
    torch.testing.assert_close(ours, theirs)


def test_fused_modules():
    plain = mk.InvertedResidual(8, 8, stride=1, expand_ratio=3).to(DEVICE).eval()
    fused = mk.fuse(plain, backend="triton")
    x = torch.randn(1, 8, 4, 3, device=DEVICE)
    with torch.no_grad():
        with cases.runs_on("triton"):
            y = fused(x)
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)


def test_a_chosen_backend_is_triton_on_a_gpu_alone():
    x, weights = cases.make_inputs(BLOCK)
    if HAS_GPU:
        x_gpu, weights_gpu = make_inputs(BLOCK, torch.float16)
        with cases.runs_on("triton"):
            inverted_residual(x_gpu, weights_gpu, **BLOCK.settings)
    half = x.half(), weights.to(torch.float16)
    cpu = next(backend for backend in BACKENDS if backend.name == "cpu")
    compiled = "cpu" if cpu.why_not(x) is None else "reference"
    with cases.runs_on(compiled):  # The interpreter is only for those who ask.
        inverted_residual(*half, **BLOCK.settings)
        inverted_residual(x, weights, **BLOCK.settings)


def test_what_is_refused():
    x, weights = make_inputs(BLOCK)
    sentence = "backend 'triton' cannot run here: x must be float32, float16 or bfloat16, got"
    with pytest.raises(RuntimeError, match=sentence):
        inverted_residual(x.double(), weights.to(torch.float64), backend="triton")
    with pytest.raises(RuntimeError, match="or on the CPU for Triton's interpreter, got meta"):
        inverted_residual(x.to("meta"), weights.to("meta"), backend="triton")


def test_what_backends_say():
    said = mk.backends()["triton"]
    assert said.startswith("float16, bfloat16 and float32, Triton ")
    assert ("NVIDIA GPUs" in said) == HAS_GPU and ("no GPU here" in said) != HAS_GPU


CHILD = """
import sys
{before}
import torch, mnv2_kernels as mk
from mnv2_kernels.ops.backends import ran
x = torch.randn(1, 8, 5, 5)
block = mk.InvertedResidual(8, 8, stride=1, expand_ratio=3).eval()
print(mk.backends()["triton"])
with torch.no_grad():
    y = mk.fuse(block)(x)
    print(dict(ran()), torch.allclose(y, block(x), atol=1e-4))
    try:
        before = ran()
        mk.fuse(block, backend="triton")(x)
        print("ran", *(ran() - before))
    except RuntimeError as error:
        print(error)
"""


def test_without_triton(python):
    done = python("-c", CHILD.format(before="sys.modules['triton'] = None"))
    assert done.returncode == 0, done.stderr
    backends, automatic, asked = done.stdout.splitlines()
    assert backends.startswith("cannot run: Triton is not installed (")
    assert automatic.endswith("True") and "triton" not in automatic
    assert "backend 'triton' cannot run here: Triton is not installed (" in asked


def test_without_the_extension(python):
    """On the CPU the reference takes its place, never the interpreter."""
    hidden = "sys.modules['mnv2_kernels._C'] = None"
    done = python("-c", CHILD.format(before=hidden))
    assert done.returncode == 0, done.stderr
    _, automatic, asked = done.stdout.splitlines()
    assert automatic == "{} True" and asked == "ran triton"
