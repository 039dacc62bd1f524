"""From the arguments of an op to a launch of the patch kernel."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.library import wrap_triton

from ...block.config import NO_CLIP, BlockConfig, Clip, Padding
from . import configs, precision
from .configs import PatchConfig
from .kernels.geometry import slots
from .kernels.patch import inverted_residual_patch


class Launch(NamedTuple):
    """The kernel's arguments after its tensors, and the number of programs that run."""

    programs: int
    sizes: tuple
    bounds: tuple[float, ...]
    constants: dict


def depthwise_constants(
    block: BlockConfig,
    biases: tuple[bool, ...],
    curves: tuple[int, ...],
    shape: tuple[int, int, int],
    config: PatchConfig,
    dtype: torch.dtype,
) -> dict:
    """The constants that a kernel needs up to the depthwise result."""
    _, height, width = shape
    height_out, width_out = block.output_hw(height, width)
    top, left, _, _ = block.padding

    def safe(size, before: int, outputs, patch: int) -> int:
        """Slots from the padding up to this one lie inside the image in every patch."""
        if not isinstance(size, int):
            return 0  # A symbolic size: none is known to.
        extent = slots(patch, block.kernel_size, block.stride, block.dilation)
        return min(extent, size + before - (-(-outputs // patch) - 1) * patch * block.stride)

    return {
        "C_IN": block.in_channels,
        "C_HIDDEN": block.hidden_channels,
        "KERNEL": block.kernel_size,
        "STRIDE": block.stride,
        "DILATION": block.dilation,
        "PAD_TOP": top,
        "PAD_LEFT": left,
        "EXPANSION": block.expansion,
        "B_EXPAND": biases[0],
        "B_DW": biases[1],
        "CURVE_EXPAND": curves[0] if block.expansion else 0,
        "CURVE_DW": curves[1],
        "SAFE_ROWS": safe(height, top, height_out, config.patch_h),
        "SAFE_COLUMNS": safe(width, left, width_out, config.patch_w),
        "WHOLE_ROW": width if isinstance(width, int) and width_out <= config.patch_w else 0,
        "PRECISION": precision(dtype),
        "PATCHES": config.patches,
        "PATCH_H": config.patch_h,
        "PATCH_W": config.patch_w,
        "CHUNK": config.chunk,
        "IN_TILE": config.in_tile,
        "KEEP_X": config.keep_x,
    }


def plan_launch(
    block: BlockConfig,
    biases: tuple[bool, bool, bool],
    clips: tuple[Clip, Clip, Clip],
    shape: tuple[int, int, int],
    config: PatchConfig,
    dtype: torch.dtype,
    curves: tuple[int, int, int] = (0, 0, 0),
) -> Launch:
    """The launch for x of shape (N, H, W): arithmetic alone, on any machine.

    `biases` says which of the three biases there are; `curves` are numbers of the op `mbconv`.
    """
    batch, height, width = shape
    height_out, width_out = block.output_hw(height, width)
    patch_rows = -(-height_out // config.patch_h)
    patch_columns = -(-width_out // config.patch_w)
    patches = batch * patch_rows * patch_columns
    out_groups = -(-block.out_channels // (config.out_tile * config.out_tiles))
    constants = depthwise_constants(block, biases, curves, shape, config, dtype) | {
        "C_OUT": block.out_channels,
        "RESIDUAL": block.residual,
        "B_PROJECT": biases[2],
        "ZERO_EXPAND": clips[0][0] == 0,
        "ZERO_DW": clips[1][0] == 0,
        "CURVE_PROJECT": curves[2],
        "ACTIVATE_PROJECT": curves[2] != 0 or clips[2] != NO_CLIP,
        "WIDE": patches >= 2**31 - config.patches,
        "HALF": config.half,
        "OUT_TILE": config.out_tile,
        "OUT_TILES": config.out_tiles,
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
    curves: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """Launch the kernel for arguments that `contract.check` has passed, on x's device.

    On CUDA tensors it runs on the current stream and can be captured in a CUDA graph; on CPU
    tensors Triton's interpreter runs it. `config` replaces the one that would be chosen. `curves`
    are those of the op `mbconv`.
    """
    clips = (tuple(clip_expand), tuple(clip_dw), tuple(clip_project))
    settings = (stride, tuple(padding), dilation, residual)
    present = tuple(t is not None for t in (w_expand, b_expand, b_dw, b_project))
    # Sizes that are symbols cannot be looked up.
    prepare = _prepare if all(type(n) is int for n in x.shape) else _prepare.__wrapped__
    prepared = prepare(
        tuple(x.shape),
        (*w_dw.shape, w_project.shape[1]),
        present,
        settings,
        clips,
        curves,
        x.dtype,
        x.device,
        precision(x.dtype),
        config,
    )
    y = torch.empty(
        prepared.y_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if x.shape[0] == 0:
        return y
    x = x.contiguous(memory_format=torch.channels_last)
    tensors = contiguous((w_expand, b_expand, w_dw, b_dw, w_project, b_project), w_dw)
    run(inverted_residual_patch, (x, *tensors, y), prepared.launch, prepared.options)
    return y


def contiguous(tensors: tuple[Tensor | None, ...], instead: Tensor) -> list[Tensor]:
    """Contiguous; for a missing tensor `instead`, a pointer that the kernel never follows."""
    return [(instead if t is None else t).contiguous() for t in tensors]


def run(kernel, tensors: tuple[Tensor, ...], launch: Launch, options: dict[str, int]) -> None:
    """One launch on the device of the tensors, or in the interpreter."""
    arguments = (*tensors, *launch.sizes, *launch.bounds)
    grid, first = (launch.programs,), tensors[0]
    if not first.is_cuda:
        from . import interpreter

        interpreter.run(kernel.__name__, grid, arguments, launch.constants)
        return
    # The compiler's own tensors have no memory to launch on: it records the launch.
    if isinstance(first, FunctionalTensor):
        kernel = wrap_triton(kernel)
    with _on_device(first):
        kernel[grid](*arguments, **launch.constants, **options)


class _Prepared(NamedTuple):
    y_shape: tuple[int, ...]
    launch: Launch
    options: dict[str, int]


def block_of(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    expansion: bool,
    settings: tuple[int, Padding, int, bool],
) -> BlockConfig:
    """The block of a call; `weight_shape` is that of w_dw and then C_out."""
    kernel_size, _, hidden_channels, out_channels = weight_shape
    stride, padding, dilation, residual = settings
    return BlockConfig(
        in_channels=x_shape[1],
        hidden_channels=hidden_channels,
        out_channels=out_channels,
        stride=stride,
        expansion=expansion,
        kernel_size=kernel_size,
        dilation=dilation,
        padding=padding,
        residual=residual,
    )


@lru_cache(maxsize=4096)
def _prepare(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    present: tuple[bool, ...],
    settings: tuple[int, Padding, int, bool],
    clips: tuple[Clip, Clip, Clip],
    curves: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    config: PatchConfig | None,
) -> _Prepared:
    """All that does not depend on the tensors themselves: a call is short on a GPU.

    `precision` only tells apart calls before and after a change of PyTorch's switch.
    """
    batch, _, height, width = x_shape
    expansion, *biases = present
    block = block_of(x_shape, weight_shape, expansion, settings)
    height_out, width_out = block.output_hw(height, width)
    if config is None:
        known_width = width_out if isinstance(width_out, int) else None
        kind = configs.without_half(dtype) if any(curves) else dtype
        config = configs.choose(block, kind, device, known_width).config
        # Sums in fp16 of what has no bounds could overflow where the layers' do not.
        bounded = expansion and all(map(math.isfinite, clips[0]))
        config = replace(config, half=config.half and bounded)
    shape = (batch, height, width)
    return _Prepared(
        y_shape=(batch, block.out_channels, height_out, width_out),
        launch=plan_launch(block, tuple(biases), clips, shape, config, dtype, curves),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def _on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, whatever its arguments are on."""
    if torch.cuda.device_count() > 1 and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
