"""The compiled CUDA op, run on CPU tensors in the emulator, and the kernel that it chooses."""

import subprocess
from dataclasses import replace

import cases
import emulated_cuda
import emulated_cuda_op
import pytest
import torch
from bad_calls import BAD_CALLS, fill, good_call
from cases import Case, expect, make_inputs, why_wrong
from cuda_calls import (
    DTYPES,
    GENERIC,
    PATCH,
    TILE,
    arguments,
    backends,
    blocks_of,
    compiles,
    inputs,
    kernel_of,
    odd_view,
)

from mnv2_kernels.block.config import mobilenet_v2_block_inputs
from mnv2_kernels.ops.extension import module as _C

pytestmark = pytest.mark.sampled(2)

REASON = emulated_cuda_op.why_not()
emulates = pytest.mark.skipif(REASON is not None, reason=str(REASON))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def test_the_op_compiles_with_the_headers_of_pytorch():
    """The real ones of its CUDA streams too, without the one that only builds with CUDA have."""
    if reason := emulated_cuda.why_not():
        pytest.skip(reason)
    command = [*emulated_cuda_op.compiler(), "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-fsyntax-only"]
    command += ["-Wextra", "-Werror", str(emulated_cuda_op.SOURCES[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@emulates
@each_dtype
@pytest.mark.parametrize("case", [PATCH, TILE, GENERIC], ids=["patch", "tile", "generic"])
def test_values(case, dtype):
    op = emulated_cuda_op.op()
    x, weights = inputs(case, dtype)
    for layout in cases.LAYOUTS.values():
        y = op(*arguments(x.contiguous(memory_format=layout), weights, case))
        assert why_wrong(y, expect(case, x, weights)) is None
        assert y.is_contiguous(memory_format=torch.channels_last)


@emulates
def test_every_option_of_a_block():
    op = emulated_cuda_op.op()
    group = [c for c in cases.groups()["S4"] if c.batch < 4]
    assert len(group) >= 20 and {c.batch for c in group} == {0, 1, 2, 3}
    wrong = []
    for i, case in enumerate(group):
        x, weights = inputs(case, DTYPES[i % 3])
        reason = why_wrong(op(*arguments(x, weights, case)), expect(case, x, weights))
        wrong += [f"{case.id}: {reason}"] if reason else []
    assert not wrong, "\n".join(wrong)


@emulates
def test_biases_of_the_dtype_of_x():
    x, weights = inputs(TILE)
    half = weights.to(torch.float16)
    y = emulated_cuda_op.op()(*arguments(x, half, TILE))
    assert why_wrong(y, expect(TILE, x, half)) is None


@emulates
@pytest.mark.parametrize("case", [PATCH, TILE, GENERIC], ids=["patch", "tile", "generic"])
@pytest.mark.parametrize("odd", range(7))
def test_a_view_may_begin_anywhere(case, odd):
    op = emulated_cuda_op.op()
    x, weights = inputs(replace(case, batch=1))
    x = x.contiguous(memory_format=torch.channels_last)
    args = list(arguments(x, weights, case))
    expected = op(*args)
    args[odd] = odd_view(args[odd])
    assert torch.equal(op(*args), expected)


@emulates
def test_inputs_stay_as_they_are():
    x, weights = inputs(PATCH)
    before = [t.clone() for t in (x, *weights.tensors())]
    emulated_cuda_op.op()(*arguments(x, weights, PATCH))
    assert all(map(torch.equal, before, (x, *weights.tensors())))


@emulates
def test_bad_calls():
    op = emulated_cuda_op.op()
    for error, sentence, changes in BAD_CALLS:
        with pytest.raises(error) as raised:
            op(*(good_call() | fill(changes)).values())
        assert str(raised.value).startswith(f"inverted_residual: {sentence}")


@emulates
def test_what_else_is_refused():
    op = emulated_cuda_op.op()
    x, weights = make_inputs(GENERIC)
    exact = arguments(x.double(), weights.to(torch.float64), GENERIC)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16 for the CUDA ker"):
        op(*exact)
    op.configure(shared_bytes=100)
    try:
        sentence = (
            r"the CUDA kernel generic was not launched for x of shape \[2, 5, 6, 5\], 19 hidden"
            r" channels, kernel size 3, stride 1: said by the emulator"
        )
        with pytest.raises(RuntimeError, match=sentence):
            op(*arguments(x, weights, GENERIC))
    finally:
        op.configure()


REFUSED = """
import sys, cases, cuda_calls, emulated_cuda_op
op = emulated_cuda_op.op()
op.runtime.mnv2_set_capability(int(sys.argv[1]))
x, weights = cases.make_inputs(cuda_calls.GENERIC)
arguments = cuda_calls.arguments(x, weights, cuda_calls.GENERIC)
for i in range(2):
    try:
        op(*arguments)
    except RuntimeError as error:
        print(op.runtime.mnv2_questions(), str(error).splitlines()[0])
print(op(x[:0], *arguments[1:]).shape[0])
"""


@emulates
@pytest.mark.parametrize(
    ("capability", "sentence"),
    [
        (75, "x must be on a GPU of compute capability 8.0 or later, got 7.5"),
        (0, "the CUDA kernels of this build do not run on GPU -1: said by the emulator"),
    ],
    ids=["old", "no code"],
)
def test_a_gpu_that_is_refused_is_asked_once(python, capability, sentence):
    """In a process of its own: what a GPU is, is remembered."""
    done = python("-c", REFUSED, str(capability))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"1 inverted_residual: {sentence}"] * 2 + ["0"]


@compiles
def test_every_kernel_is_chosen_for_many_cases():
    """Those that test_cuda_gpu.py runs."""
    for dtype in DTYPES[:2]:
        assert len(blocks_of("patch", dtype)) >= 40
        assert len(blocks_of("tile", dtype)) >= 200
        assert len(blocks_of("generic", dtype)) >= 200
    assert len(blocks_of("generic", torch.float32)) >= 500


@compiles
def test_which_kernel_runs_a_block():
    blocks = [
        kernel_of(Case(config, size, size), dtype)
        for config, size in mobilenet_v2_block_inputs()
        for dtype in DTYPES[:2]
    ]
    assert set(blocks) == {"patch", "tile"}
    assert {kernel_of(case, torch.float16) for case in cases.groups()["S3"]} >= {"tile", "generic"}
    every = [case for group in cases.groups().values() for case in group]
    assert {kernel_of(case, torch.float32) for case in every} == {"generic"}
    expected = zip((PATCH, TILE, GENERIC), ("patch", "tile", "generic"), strict=True)
    assert all(kernel_of(case, torch.float16) == name for case, name in expected)


@compiles
def test_kernels_are_known_by_the_op_as_by_python():
    """Every argument reaches the choice: the emulator's library makes it from a real call."""
    if reason := emulated_cuda.why_not():
        pytest.skip(reason)
    for group in ("S1-width1", "S2", "S4"):
        for case in cases.groups()[group][::3]:
            x, weights = inputs(case)
            assert emulated_cuda.chosen(x, weights, **case.settings) == kernel_of(
                case, torch.float16
            ), case.id


@compiles
def test_bad_questions_about_kernels():
    block = backends.Block.of(PATCH.config, PATCH.clips)
    with pytest.raises(ValueError, match="dtype must be float16, bfloat16 or float32, got 'int8'"):
        _C.cuda_kernel(*block[:-2], 8, 8, "int8")
    assert backends.cuda_kernel(torch.empty(3), block) is None
