"""Blocks with curves and squeeze-excite that are quick in Triton's interpreter."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from mbconv_blocks import MBConvCase, mbconv_cases
from torch import Tensor
from triton_cases import DEVICE

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig
from mnv2_kernels.ops.inverted_residual import op_arguments
from mnv2_kernels.ops.triton import launch_gate
from mnv2_kernels.ops.triton.configs import PatchConfig

# Channels and pixels that no tile divides, several tiles of each.
ODD = MBConvCase(
    BlockConfig(9, 37, 21, stride=2, padding=(0, 1, 2, 1), squeeze_channels=5),
    13,
    10,
    batch=2,
    between=("silu", "silu", NO_CLIP),
    squeeze="silu",
    scale="sigmoid",
)
RESIDUAL = MBConvCase(
    BlockConfig(20, 41, 20, kernel_size=5, padding=(2,) * 4, residual=True, squeeze_channels=70),
    6,
    5,
    batch=1,
    between=(RELU6, "hardswish", RELU6),
)
T1 = MBConvCase(
    BlockConfig(19, 19, 8, expansion=False, dilation=2, padding=(2,) * 4, squeeze_channels=3),
    5,
    4,
    batch=1,
    between=(NO_CLIP, "gelu_tanh", "silu"),
    squeeze=RELU,
    scale="sigmoid",
)
CURVES_ALONE = replace(
    RESIDUAL,
    config=replace(RESIDUAL.config, squeeze_channels=0),
    between=("hardswish", "silu", "gelu"),
)
# More tiles than are added up at once, and several groups of output channels.
MANY = MBConvCase(
    BlockConfig(6, 6, 70, expansion=False, squeeze_channels=2),
    23,
    23,
    batch=1,
    between=(NO_CLIP, "silu", NO_CLIP),
)
BLOCKS = {"odd": ODD, "residual": RESIDUAL, "t1": T1, "curves alone": CURVES_ALONE}


def few_pixels() -> Iterator[MBConvCase]:
    """Those of `mbconv_cases` that Triton takes, in images of 6 rows and columns at most, or with a
    result of one row; a quarter of them without a gate.
    """
    for i, case in enumerate(mbconv_cases()):
        block = case.config
        if block.dense or block.kernel_size > 5 or block.dilation > 2:
            continue
        if i % 4 == 0 and isinstance(case.between[1], str):
            block = replace(block, squeeze_channels=0)
        top, left, bottom, right = block.padding
        extent = block.dilation * (block.kernel_size - 1) + 1
        height = max(4 + i % 3, extent - top - bottom)
        width = max(6 - i % 2, extent - left - right)
        yield replace(case, config=block, height=height, width=width, batch=1 + (i % 5 == 0))


def inputs(case: MBConvCase, dtype) -> tuple[Tensor, FoldedWeights]:
    """Those of the case on the device."""
    x, weights = case.inputs(dtype)
    return x.to(DEVICE), weights.to(DEVICE)


def run_config(x: Tensor, weights: FoldedWeights, case: MBConvCase, config: PatchConfig) -> Tensor:
    """A call with this configuration up to the depthwise instead of the chosen one."""
    return launch_gate.mbconv(x, *op_arguments(weights, case.config), config)


def plan(
    case: MBConvCase, config: PatchConfig, dtype: torch.dtype, batch: int | None = None
) -> launch_gate.Launches:
    """The launches of a block with a gate, for `batch` images if it is given."""
    _, weights = replace(case, batch=1, height=1, width=1).inputs(dtype)
    *_, curves, bounds, scale = op_arguments(weights, case.config)
    biases = [t is not None for t in (*weights.tensors()[1::2], *weights.gate.tensors()[1::2])]
    size = (batch or case.batch, case.height, case.width)
    return launch_gate.plan_launches(
        case.config, tuple(biases), curves, bounds, scale, size, config, dtype
    )
