"""From the op's arguments to a launch of the patch kernel."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton

from ..block import NO_CLIP, BlockConfig, Clip, Padding
from . import configs, interpreter
from .configs import PatchConfig
from .patch import inverted_residual_patch, slots


class Launch(NamedTuple):
    """What the kernel is called with behind its tensors, and how many programs of it run."""

    programs: int
    sizes: tuple
    bounds: tuple[float, ...]
    constants: dict


def plan_launch(
    block: BlockConfig,
    biases: tuple[bool, bool, bool],
    clips: tuple[Clip, Clip, Clip],
    shape: tuple[int, int, int],
    config: PatchConfig,
    dtype: torch.dtype,
) -> Launch:
    """The launch for x of shape (N, H, W): arithmetic alone, on any machine.

    `biases` says which of the three biases there are.
    """
    batch, height, width = shape
    height_out, width_out = block.output_hw(height, width)
    patch_rows = -(-height_out // config.patch_h)
    patch_columns = -(-width_out // config.patch_w)
    patches = batch * patch_rows * patch_columns
    top, left, _, _ = block.padding
    out_groups = -(-block.out_channels // (config.out_tile * config.out_tiles))

    def safe(size, before: int, patch_count, patch: int) -> int:
        """Slots from the padding up to this one lie inside the image in every patch."""
        if not isinstance(size, int):
            return 0  # A symbolic size: none is known to.
        extent = slots(patch, block.kernel_size, block.stride, block.dilation)
        return min(extent, size + before - (patch_count - 1) * patch * block.stride)

    constants = {
        "C_IN": block.in_channels,
        "C_HIDDEN": block.hidden_channels,
        "C_OUT": block.out_channels,
        "KERNEL": block.kernel_size,
        "STRIDE": block.stride,
        "DILATION": block.dilation,
        "PAD_TOP": top,
        "PAD_LEFT": left,
        "EXPANSION": block.expansion,
        "RESIDUAL": block.residual,
        "B_EXPAND": biases[0],
        "B_DW": biases[1],
        "B_PROJECT": biases[2],
        "ZERO_EXPAND": clips[0][0] == 0,
        "ZERO_DW": clips[1][0] == 0,
        "CLIP_PROJECT": clips[2] != NO_CLIP,
        "SAFE_ROWS": safe(height, top, patch_rows, config.patch_h),
        "SAFE_COLUMNS": safe(width, left, patch_columns, config.patch_w),
        "WHOLE_ROW": width if isinstance(width, int) and width_out <= config.patch_w else 0,
        "WIDE": patches >= 2**31 - config.patches,
        "PRECISION": configs.precision(dtype),
        "HALF": config.half,
        "PATCHES": config.patches,
        "PATCH_H": config.patch_h,
        "PATCH_W": config.patch_w,
        "CHUNK": config.chunk,
        "IN_TILE": config.in_tile,
        "OUT_TILE": config.out_tile,
        "OUT_TILES": config.out_tiles,
        "KEEP_X": config.keep_x,
    }
    return Launch(
        programs=-(-patches // config.patches) * out_groups,
        sizes=(patches, height, width, height_out, width_out, patch_rows, patch_columns),
        bounds=tuple(bound for clip in clips for bound in clip),
        constants=constants,
    )


def inverted_residual(
    x: Tensor,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    w_dw: Tensor,
    b_dw: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    stride: int,
    padding: Padding,
    dilation: int,
    residual: bool,
    clip_expand: Clip,
    clip_dw: Clip,
    clip_project: Clip,
    config: PatchConfig | None = None,
) -> Tensor:
    """Launch the kernel for arguments that `ops.check` has passed, on x's device.

    On CUDA tensors it runs on the current stream and can be captured in a CUDA graph; on CPU
    tensors Triton's interpreter runs it. `config` replaces the one that would be chosen.
    """
    block = BlockConfig(
        in_channels=x.shape[1],
        hidden_channels=w_dw.shape[2],
        out_channels=w_project.shape[1],
        stride=stride,
        expansion=w_expand is not None,
        kernel_size=w_dw.shape[0],
        dilation=dilation,
        padding=tuple(padding),
        residual=residual,
    )
    batch, _, height, width = x.shape
    y = torch.empty(
        (batch, block.out_channels, *block.output_hw(height, width)),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if batch == 0:
        return y
    if config is None:
        width_out = y.shape[3] if isinstance(y.shape[3], int) else None
        config = configs.choose(block, x.dtype, x.device, width_out).config
    biases = (b_expand, b_dw, b_project)
    launch = plan_launch(
        block,
        tuple(b is not None for b in biases),
        (tuple(clip_expand), tuple(clip_dw), tuple(clip_project)),
        (batch, height, width),
        config,
        x.dtype,
    )
    # A pointer the kernel never follows stands in for a tensor that there is none of.
    tensors = [
        (w_dw if t is None else t).contiguous()
        for t in (w_expand, b_expand, w_dw, b_dw, w_project, b_project)
    ]
    x = x.contiguous(memory_format=torch.channels_last)
    arguments = (x, *tensors, y, *launch.sizes, *launch.bounds)
    grid = (launch.programs,)
    if not x.is_cuda:
        interpreter.run(grid, arguments, launch.constants)
        return y
    kernel = wrap_triton(inverted_residual_patch)[grid]
    with _on_device(x):
        kernel(
            *arguments,
            **launch.constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y


def _on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, whatever its arguments are on."""
    if torch.cuda.device_count() > 1 and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
