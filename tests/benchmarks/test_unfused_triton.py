"""The block in three Triton kernels: right in the interpreter, and accepted by the compiler."""

from dataclasses import replace

import cases
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu import unfused_kernels, unfused_triton
from mnv2_kernels import InvertedResidual, fuse
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig
from mnv2_kernels.ops.inverted_residual import op_arguments

pytestmark = pytest.mark.sampled(2)

SHAPES = [
    cases.Case(BlockConfig(8, 24, 8, residual=True), 5, 9, 2),
    cases.Case(BlockConfig(16, 40, 24, stride=2), 9, 6),
    cases.Case(BlockConfig(5, 19, 7, kernel_size=5, padding=(2, 2, 2, 2)), 7, 6),
    cases.Case(BlockConfig(12, 36, 33, dilation=2, padding=(2, 1, 0, 2)), 6, 8),
    cases.Case(BlockConfig(6, 18, 6, stride=2, kernel_size=5, padding=(1, 1, 2, 2)), 8, 8),
    cases.Case(BlockConfig(16, 16, 8, expansion=False), 4, 11),
    cases.Case(BlockConfig(4, 12, 4), 3, 3, biases=(False, False, False)),
    cases.Case(BlockConfig(4, 12, 4), 3, 3, clips=(RELU, NO_CLIP, RELU6)),
    cases.Case(BlockConfig(4, 12, 4, padding=(0, 0, 1, 1), stride=2), 4, 4),
]


def run(case: cases.Case, x, weights):
    x = x.contiguous(memory_format=torch.channels_last)
    return unfused_triton.inverted_residual(x, *op_arguments(weights, case.config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
def test_three_kernels_are_the_block(case, dtype):
    x, weights = cases.make_inputs(case)
    x, weights = x.to(dtype), weights.to(dtype)
    y = run(case, x, weights)
    assert y.is_contiguous(memory_format=torch.channels_last)
    wrong = cases.why_wrong(y, cases.expect(case, x, weights))
    assert wrong is None, wrong


def test_nan_is_not_clipped_away():
    case = SHAPES[0]
    x, weights = cases.make_inputs(case)
    x[0, :, 2, 3] = float("nan")
    truth = cases.expect(case, x, weights).truth
    assert torch.equal(run(case, x, weights).isnan(), truth.isnan())
    assert truth.isnan().any() and not truth.isnan().all()


def test_a_network_of_three_kernels_a_block():
    model = torch.nn.Sequential(InvertedResidual(4, 6, stride=2), InvertedResidual(6, 6)).eval()
    x = torch.randn(1, 4, 6, 6)
    with torch.inference_mode():
        expected = model[1].plain_forward(model[0].plain_forward(x))
        unfused = unfused_triton.unfuse(fuse(model))
        blocks = [m for m in unfused if isinstance(m, unfused_triton.UnfusedBlock)]
        assert len(blocks) == 2
        torch.testing.assert_close(unfused(x), expected, rtol=1e-4, atol=1e-4)
        single = unfused_triton.unfuse(fuse(model[1]))
        assert isinstance(single, unfused_triton.UnfusedBlock)


def compiled(kernel, constants: dict, options: dict, dtype: str):
    """The kernel for an H200, on any machine."""
    scalars = {"lower": "fp32", "upper": "fp32"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("x", "w", "y", "shortcut"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "*fp32" if name == "bias" else scalars.get(name, "i32")
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def options(config: triton.Config) -> dict:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def spills(kernel) -> bool:
    return any(word in kernel.asm["ptx"] for word in (".local .align", "st.local"))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        *((config, "fp16") for config in unfused_triton.POINTWISE_CONFIGS[::3]),
        (unfused_triton.POINTWISE_CONFIGS[1], "bf16"),
        (unfused_triton.POINTWISE_CONFIGS[5], "fp32"),
    ],
    ids=str,
)
def test_the_1x1_convolution_compiles(config, dtype):
    constants = {"IN_UNIT": 8, "OUT_UNIT": 16, "BIAS": True, "RESIDUAL": True, **config.kwargs}
    kernel = compiled(unfused_kernels.pointwise, constants, options(config), dtype)
    assert not spills(kernel)
    ptx = kernel.asm["ptx"]
    # The tile's copy is 16 bytes wide although a row holds 24 channels: 8 is known to divide it.
    if dtype != "fp32":
        assert "mma.sync" in ptx or "wgmma" in ptx
        assert "cp.async.cg.shared.global" in ptx and "0x10" in ptx


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        *((config, "fp16") for config in unfused_triton.DEPTHWISE_CONFIGS[::3]),
        (unfused_triton.DEPTHWISE_CONFIGS[0], "bf16"),
        (unfused_triton.DEPTHWISE_CONFIGS[0], "fp32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_depthwise_compiles(config, dtype, stride):
    constants = {"UNIT": 16, "BIAS": True, "KERNEL": 3, "STRIDE": stride, "DILATION": 1}
    constants |= {"PAD_TOP": 1, "PAD_LEFT": 1, **config.kwargs}
    kernel = compiled(unfused_kernels.depthwise, constants, options(config), dtype)
    assert not spills(kernel)
    # Channels move 16 bytes at a time where a thread has that many.
    assert "ld.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_device(dtype):
    for case in SHAPES[:4] + [replace(SHAPES[0], height=56, width=56)]:
        x, weights = cases.make_inputs(case)
        x, weights = x.to(dtype), weights.to(dtype)
        y = run(case, x.cuda(), weights.to("cuda")).cpu()
        wrong = cases.why_wrong(y, cases.expect(case, x, weights))
        assert wrong is None, wrong
