"""From the arguments of the op `mbconv` to launches of the kernels of gate.py, or of one kernel
where a block has no gate.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...block.config import NO_CLIP, BlockConfig, Padding
from . import configs, precision
from .configs import PatchConfig
from .kernels.gate import depthwise_sums, excitation, gated_projection
from .launch import Launch, block_of, contiguous, depthwise_constants, inverted_residual, run

EXCITATION_OPTIONS = {"num_warps": 8}
PROJECTION_OPTIONS = {"num_warps": 4, "num_stages": 2}
# Elements of the matrices that a program of `excitation` adds up at a time.
_ELEMENTS = 8192


class Launches(NamedTuple):
    """One for each kernel, and how many tiles of an image the first one sums."""

    sums: Launch
    excitation: Launch
    projection: Launch
    image_tiles: int


def plan_launches(
    block: BlockConfig,
    biases: tuple[bool, ...],
    curves: tuple[int, ...],
    bounds: tuple[float, ...],
    scale: int,
    shape: tuple[int, int, int],
    config: PatchConfig,
    dtype: torch.dtype,
) -> Launches:
    """The launches for x of shape (N, H, W): arithmetic alone, on any machine.

    `biases` says which there are of expansion, depthwise, projection, squeeze and excitation.
    """
    batch, height, width = shape
    height_out, width_out = block.output_hw(height, width)
    patch_rows = -(-height_out // config.patch_h)
    patch_columns = -(-width_out // config.patch_w)
    image_tiles = -(-patch_rows * patch_columns // config.patches)
    image_pixels = height_out * width_out
    sums = Launch(
        programs=batch * image_tiles,
        sizes=(height, width, height_out, width_out, patch_rows, patch_columns),
        bounds=bounds[:4],
        constants=depthwise_constants(block, biases, curves, shape, config, dtype),
    )
    hidden = triton.next_power_of_2(block.hidden_channels)
    excite = Launch(
        programs=batch,
        sizes=(image_tiles, image_pixels),
        bounds=bounds[6:],
        constants={
            "C_HIDDEN": block.hidden_channels,
            "C_SQUEEZED": block.squeeze_channels,
            "B_SQUEEZE": biases[3],
            "B_EXCITE": biases[4],
            "CURVE": curves[3],
            "SCALE": scale,
            "HIDDEN": hidden,
            "STEP": min(32, max(1, _ELEMENTS // hidden)),
        },
    )
    pixels = batch * image_pixels
    constants = {
        "C_HIDDEN": block.hidden_channels,
        "C_OUT": block.out_channels,
        "RESIDUAL": block.residual,
        "B_PROJECT": biases[2],
        "CURVE": curves[2],
        "ACTIVATE": curves[2] != 0 or bounds[4:6] != NO_CLIP,
        "PRECISION": precision(dtype),
        "PIXELS": 64,
        "CHUNK": 128 // dtype.itemsize,
        "OUT_TILE": max(16, min(64, triton.next_power_of_2(block.out_channels))),
    }
    projection = Launch(
        programs=-(-pixels // 64) * -(-block.out_channels // constants["OUT_TILE"]),
        sizes=(pixels, image_pixels),
        bounds=bounds[4:6],
        constants=constants,
    )
    return Launches(sums, excite, projection, image_tiles)


def mbconv(
    x: Tensor,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    w_dw: Tensor,
    b_dw: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    w_squeeze: Tensor | None,
    b_squeeze: Tensor | None,
    w_excite: Tensor | None,
    b_excite: Tensor | None,
    stride: int,
    padding: Padding,
    dilation: int,
    residual: bool,
    curves: tuple[int, ...],
    bounds: tuple[float, ...],
    scale: int,
    config: PatchConfig | None = None,
) -> Tensor:
    """As `launch.inverted_residual`, for arguments that `contract.check_mbconv` has passed.

    Raises:
        RuntimeError: no kernel has such a convolution between the 1x1 ones.
    """
    if w_dw.dim() != 3 or w_dw.shape[0] > 5 or dilation > 2:
        raise RuntimeError(
            "mbconv: Triton's kernels take a depthwise of kernel size 3 or 5 and dilation 1 or 2,"
            f" got w_dw {tuple(w_dw.shape)} and dilation {dilation}"
        )
    settings = (stride, tuple(padding), dilation, residual)
    curves, bounds = tuple(curves), tuple(bounds)
    of_block = (w_expand, b_expand, w_dw, b_dw, w_project, b_project)
    if w_squeeze is None:
        clips = (bounds[:2], bounds[2:4], bounds[4:6])
        return inverted_residual(x, *of_block, *settings, *clips, config, curves[:3])
    biases = (b_expand, b_dw, b_project, b_squeeze, b_excite)
    prepare = _prepare if all(type(n) is int for n in x.shape) else _prepare.__wrapped__
    planned, options, block = prepare(
        tuple(x.shape),
        (*w_dw.shape, w_project.shape[1]),
        w_squeeze.shape[1],
        tuple(t is not None for t in (w_expand, *biases)),
        settings,
        (curves, bounds, scale),
        x.dtype,
        x.device,
        precision(x.dtype),
        config,
    )
    batch, _, height, width = x.shape
    size = block.output_hw(height, width)
    y = torch.empty(
        (batch, block.out_channels, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if batch == 0:
        return y
    hidden = block.hidden_channels
    x = x.contiguous(memory_format=torch.channels_last)
    weights = contiguous((*of_block, w_squeeze, b_squeeze, w_excite, b_excite), w_dw)
    kept = x.new_empty((batch, *size, hidden))
    sums = x.new_empty((batch, planned.image_tiles, hidden), dtype=torch.float32)
    gate = x.new_empty((batch, hidden), dtype=torch.float32)
    run_kernels(planned, options, x, weights, kept, sums, gate, y)
    return y


def run_kernels(
    launches: Launches,
    options: dict[str, int],
    x: Tensor,
    weights: list[Tensor],
    kept: Tensor,
    sums: Tensor,
    gate: Tensor,
    y: Tensor,
) -> None:
    """The launches alone, which read and write just these tensors; options of the first one."""
    run(depthwise_sums, (x, *weights[:4], kept, sums), launches.sums, options)
    run(excitation, (sums, *weights[6:], gate), launches.excitation, EXCITATION_OPTIONS)
    tensors = (kept, gate, *weights[4:6], x, y)
    run(gated_projection, tensors, launches.projection, PROJECTION_OPTIONS)


@lru_cache(maxsize=4096)
def _prepare(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    squeeze_channels: int,
    present: tuple[bool, ...],
    settings: tuple[int, Padding, int, bool],
    between: tuple[tuple[int, ...], tuple[float, ...], int],
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    config: PatchConfig | None,
) -> tuple[Launches, dict[str, int], BlockConfig]:
    """As `launch._prepare`."""
    expansion, *biases = present
    batch, _, height, width = x_shape
    block = block_of(x_shape, weight_shape, expansion, settings)
    block = replace(block, squeeze_channels=squeeze_channels)
    if config is None:
        config = configs.of_sums(block, dtype, device)
    shape = (batch, height, width)
    planned = plan_launches(block, tuple(biases), *between, shape, config, dtype)
    return planned, {"num_warps": config.num_warps, "num_stages": config.num_stages}, block
