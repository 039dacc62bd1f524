"""Triton's kernels for the ends of a network: in the interpreter, in a plan, compiled."""

from math import inf, nan

import pytest
import torch
from memory_layouts import in_memory_order
from torch import nn
from torch.nn import functional as F
from triton_cases import DEVICE, DTYPES, HAS_GPU
from triton_mutants import interpret, mutate

import mnv2_kernels as mk
from benchmarks.machine_code.read import resources
from benchmarks.machine_code.triton_code import ARCHITECTURES, arithmetic, compile_launch
from mnv2_kernels.block.config import NO_CLIP, RELU6
from mnv2_kernels.network import plan as plan_module
from mnv2_kernels.ops import triton
from mnv2_kernels.ops.reference import activate
from mnv2_kernels.ops.triton import launch_ends
from mnv2_kernels.ops.triton.kernels import ends

# (N, C_in, H, W), C_out, padding (top, left, bottom, right)
STEMS = {
    "photographs": ((2, 3, 17, 19), 32, (1, 1, 1, 1)),
    "TensorFlow's padding": ((1, 3, 16, 18), 24, (0, 0, 1, 1)),
    "one pixel": ((1, 3, 1, 1), 16, (1, 1, 1, 1)),
    "many channels": ((3, 9, 6, 5), 72, (2, 1, 0, 2)),
}
POOLED = {
    "7x7": ((2, 40, 7, 7), 130),
    "one pixel": ((3, 16, 1, 1), 16),
    "more pixels than a tile": ((1, 17, 9, 11), 65),
}
# Twice what rounding the result takes.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ACTIVATIONS = (RELU6, NO_CLIP, (-0.5, 0.25), "hardswish", "silu")


def is_close(y, expected) -> bool:
    tolerance = TOLERANCES[y.dtype]
    return torch.allclose(y.double(), expected, rtol=tolerance, atol=tolerance)


def stem_inputs(name: str, dtype: torch.dtype = torch.float32):
    shape, out_channels, padding = STEMS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(3, 3, shape[1], out_channels, generator=generator) / 5
    bias = torch.randn(out_channels, generator=generator)
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE), padding


def stem_in_double(x, weight, bias, padding, activation):
    top, left, bottom, right = padding
    x = F.pad(x.double(), (left, right, top, bottom))
    return activate(F.conv2d(x, weight.double().permute(3, 2, 1, 0), bias.double(), 2), activation)


def pooled_inputs(name: str, dtype: torch.dtype = torch.float32):
    shape, out_channels = POOLED[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(shape[1], out_channels, generator=generator) / 6
    bias = torch.randn(out_channels, generator=generator)
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE)


def pooled_in_double(x, weight, bias, activation):
    weight = weight.double().t()[:, :, None, None]
    return activate(F.conv2d(x.double(), weight, bias.double()), activation).mean((2, 3))


# What runs, what it should give, what both are given.
ENDS = {f"stem: {name}": (triton.stem, stem_in_double, stem_inputs, name) for name in STEMS} | {
    f"pooled: {name}": (triton.pooled, pooled_in_double, pooled_inputs, name) for name in POOLED
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", ENDS)
def test_values(end, dtype):
    run, reference, inputs, name = ENDS[end]
    given = inputs(name, dtype)
    for activation in ACTIVATIONS:
        y, expected = run(*given, activation), reference(*given, activation)
        assert y.dtype == dtype and is_close(y, expected), activation
        assert y.dim() == 2 or y.is_contiguous(memory_format=torch.channels_last)


def test_layouts_and_batches():
    x, *rest = stem_inputs("many channels")
    expected = triton.stem(x, *rest, RELU6)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1)):
        assert torch.equal(triton.stem(in_memory_order(x, order), *rest, RELU6), expected)
    for image, y in zip(x, expected, strict=True):
        assert torch.equal(triton.stem(image[None], *rest, RELU6)[0], y)
    x, *rest = pooled_inputs("7x7")
    expected = triton.pooled(x, *rest, RELU6)
    assert torch.equal(triton.pooled(x.contiguous(), *rest, RELU6), expected)
    for image, y in zip(x, expected, strict=True):
        assert torch.equal(triton.pooled(image[None], *rest, RELU6)[0], y)
    assert triton.pooled(x[:0], *rest, RELU6).shape == (0, 130)
    x, *rest = stem_inputs("photographs")
    assert triton.stem(x[:0], *rest, RELU6).shape == (0, 32, 9, 10)


@pytest.mark.parametrize("value", (nan, inf, -inf))
def test_special_values_stay_where_the_layers_have_them(value):
    x, *rest = stem_inputs("photographs")
    x[0, 1, 8, 9] = value
    y, expected = triton.stem(x, *rest, RELU6), stem_in_double(x, *rest, RELU6)
    assert torch.equal(y.isnan(), expected.isnan())
    x, *rest = pooled_inputs("7x7")
    x[1, 39, 6, 6] = value
    y, expected = triton.pooled(x, *rest, RELU6), pooled_in_double(x, *rest, RELU6)
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.fixture
def plan_without_the_network_kernel(monkeypatch):
    """Plans run step by step, the ends on Triton, as they do on a GPU."""
    monkeypatch.setattr(plan_module, "missing", "switched off")
    monkeypatch.setattr(plan_module, "takes_triton", lambda x: True)


@pytest.mark.skipif(HAS_GPU, reason="plans run on the GPU here, as test_cuda_gpu.py does")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_plan_runs_its_ends_on_triton(plan_without_the_network_kernel, monkeypatch, dtype):
    ran = []
    for name in ("stem", "pooled"):
        function = getattr(triton, name)

        def counted(*arguments, name=name, function=function):
            ran.append(name)
            return function(*arguments)

        monkeypatch.setattr(triton, name, counted)
    torch.manual_seed(0)
    model = mk.mobilenet_v2(width_mult=0.35, num_classes=10).eval()
    plan = mk.plan(model, (3, 64, 64), dtype=dtype)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = nn.Module.__call__(model, x)
        y = plan(x.to(dtype)).float()
    assert ran == ["stem", "pooled"]
    error = (y - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]


MUTANTS = {
    "rows and columns of the window exchanged": ("<< (3 * j + i)", "<< (3 * i + j)"),
    "stride 1": (".to(tl.int32) * 2 - PAD_TOP", ".to(tl.int32) - PAD_TOP"),
    "padding left out": ("* 2 - PAD_LEFT", "* 2"),
    "a row too many": ("(row0 + i < H)", "(row0 + i < H + 1)"),
    "a column too many": ("(column0 + j >= 0)", "(column0 + j >= -1)"),
    "image 0 for all": ("(line // H_out).to(tl.int64) * stride_n", "0 * stride_n"),
    "the first terms alone": ("tl.range(0, 9 * C_IN, TERMS)", "tl.range(0, TERMS, TERMS)"),
    "pixels that fill up a tile": ("tl.where(exists[:, None], v, 0.0)", "v"),
    "the last pixels alone": ("total += summed", "total = summed"),
    "mean over a tile": ("total / image_pixels.to(tl.float32)", "total / PIXELS"),
    "pixels of the first image": ("(image * image_pixels + pixel)", "(pixel)"),
    "the first channels alone": ("tl.range(0, C_IN, CHUNK)", "tl.range(0, CHUNK, CHUNK)"),
}


@pytest.mark.skipif(HAS_GPU, reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_found(mutant, monkeypatch, tmp_path):
    interpret(monkeypatch, tmp_path, mutate(*MUTANTS[mutant], ("ends",)))
    clip = (0.5, 6.0)
    close = [
        is_close(run(*inputs(name), clip), reference(*inputs(name), clip))
        for run, reference, inputs, name in ENDS.values()
    ]
    assert not all(close)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ("float16", "bfloat16", "tf32"))
def test_they_compile(kind, architecture):
    with arithmetic(kind) as dtype:
        first = launch_ends.plan_stem(
            (1, 3, 224, 224), (150528, 50176, 224, 1), 32, (1,) * 4, RELU6, dtype
        )
        last = launch_ends.plan_pooled((1, 320, 7, 7), 1280, RELU6, dtype)
        compiled = [
            compile_launch(kernel, launch, dtype, options, architecture)
            for kernel, launch, options in (
                (ends.stem, first, launch_ends.STEM_OPTIONS),
                (ends.pooled, last, launch_ends.POOLED_OPTIONS),
            )
        ]
    for kernel in compiled:
        # What every GPU since compute capability 8.0 has.
        assert kernel.metadata.shared <= 99 * 1024
        assert resources(kernel.asm["cubin"])[1] == 0, "registers are spilled"
        assert "mma.sync" in kernel.asm["ptx"] or "wgmma" in kernel.asm["ptx"]
