"""What the tests of the Triton backend share: device, half precision, configurations, launches.

Without a GPU every call below runs the same kernel source in Triton's interpreter.
"""

from dataclasses import replace
from functools import partial

import cases
import pytest
import torch
from cases import Case
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.ops.triton import configs, interpreter, launch
from mnv2_kernels.ops.triton.configs import PatchConfig
from mnv2_kernels.ops.triton.kernels.patch import inverted_residual_patch

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_gpu = pytest.mark.skipif(
    not HAS_GPU, reason="needs an NVIDIA GPU of compute capability 8.0 or later"
)
if HAS_GPU:
    # Eager's errors are allowed to no one who computes in TF32.
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"

KERNEL = inverted_residual_patch.__name__
# Few large operations: what is quick in the interpreter.
QUICK = PatchConfig(32, 2, 2, 64, 64, 64, 2, True, False, 4)
# Between them, every field has every kind of value; no two differ in one field alone.
CONFIGS = {
    "1x1": replace(QUICK, patches=16, patch_h=1, patch_w=1, in_tile=16, out_tile=16),
    "1x2": replace(QUICK, patch_h=1, chunk=16, out_tile=8, out_tiles=3, keep_x=False),
    "2x2": replace(QUICK, patches=16, chunk=32, in_tile=32, out_tile=16, out_tiles=1),
    "2x4": replace(QUICK, patches=64, patch_w=4, in_tile=16, out_tiles=1, keep_x=False),
    "3x2": replace(QUICK, patches=16, patch_h=3, chunk=32, in_tile=16, out_tile=32, out_tiles=1),
    "2x1": replace(QUICK, patches=64, patch_w=1, chunk=16, in_tile=32, out_tile=8, keep_x=False),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def with_biases_in_float(weights: FoldedWeights, dtype: torch.dtype) -> FoldedWeights:
    """Weights in `dtype`, biases in float32, as `fold` leaves them."""
    biases = {n: getattr(weights, n) for n in ("b_expand", "b_dw", "b_project")}
    return replace(weights.to(dtype), **biases)


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, FoldedWeights]:
    """`cases.make_inputs` in a dtype, on the device."""
    x, weights = cases.make_inputs(case)
    return x.to(DEVICE, dtype), with_biases_in_float(weights, dtype).to(DEVICE)


run = partial(cases.run, "triton")


def run_config(x: Tensor, weights: FoldedWeights, case: Case, config: PatchConfig) -> Tensor:
    """One launch with this configuration instead of the one the package chooses.

    On a GPU with as many patches as fit its shared memory; the interpreter has no limit.
    """
    if HAS_GPU:
        limit = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
        while config.patches > 16 and configs.shared_bytes(case.config, config, x.dtype) > limit:
            config = replace(config, patches=config.patches // 2)
    settings = case.settings.values()
    return launch.inverted_residual(
        x, *weights.tensors(), *settings, *weights.clips(), config=config
    )


def plan(case: Case, config: PatchConfig, dtype: torch.dtype = torch.float32) -> launch.Launch:
    return launch.plan_launch(
        case.config, case.biases, case.clips, (case.batch, case.height, case.width), config, dtype
    )


def launch_into(
    y: Tensor, x: Tensor, weights: FoldedWeights, case: Case, config: PatchConfig
) -> None:
    """The launch alone: reads and writes just these tensors, which must be laid out for it."""
    planned = plan(case, config, x.dtype)
    tensors = [weights.w_dw if t is None else t for t in weights.tensors()]
    arguments = (x, *tensors, y, *planned.sizes, *planned.bounds)
    if x.is_cuda:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        inverted_residual_patch[(planned.programs,)](*arguments, **planned.constants, **options)
    else:
        interpreter.run(KERNEL, (planned.programs,), arguments, planned.constants)


def chosen(case: Case, dtype: torch.dtype = torch.float32) -> PatchConfig:
    return configs.choose(case.config, dtype, DEVICE).config


def steps(case: Case, config: PatchConfig) -> int:
    """Roughly the tile operations of a launch; the interpreter does some 3,000 in a second.

    A GPU does not notice: tests leave out what is above a limit wherever they run.
    """
    block = case.config
    slots = 1
    for patch in (config.patch_h, config.patch_w):
        slots *= launch.slots(patch, block.kernel_size, block.stride, block.dilation)
    pixels = config.patch_h * config.patch_w
    in_tiles = -(-block.in_channels // config.in_tile) * (1 if config.keep_x else 3)
    chunk = slots * (in_tiles + 4) + pixels * (block.kernel_size**2 + 2 * config.out_tiles + 2)
    chunks = -(-block.hidden_channels // config.chunk)
    fixed = slots * in_tiles + pixels * config.out_tiles * 4
    return plan(case, config).programs * (chunks * chunk + fixed)


def small_real_blocks() -> list[Case]:
    """The distinct blocks of MobileNetV2 and EfficientNet-Lite0 on a few pixels."""
    real = cases.real_blocks(1.0, 224) + cases.efficientnet_lite0_blocks(224)
    sizes = ((3, 4), (5, 3), (4, 4))
    return [
        Case(config, *sizes[i % 3], batch=1 + i % 2)
        for i, config in enumerate(dict.fromkeys(case.config for case in real))
    ]
