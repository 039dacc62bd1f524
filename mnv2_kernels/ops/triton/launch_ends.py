"""Launches of the kernels of ends.py: the first layer of a plan on a GPU, and its last one."""

import torch
import triton
from torch import Tensor

from ...block.config import Activation, Padding, curve_and_clip, output_size
from . import precision
from .kernels.ends import pooled as pooled_kernel
from .kernels.ends import stem as stem_kernel
from .launch import Launch, run

# Of 16 pairs of these, the instructions of a stem are fewest with 2 warps and 128 or 256 pixels.
STEM_OPTIONS = {"num_warps": 2}
_STEM_PIXELS = 128
POOLED_OPTIONS = {"num_warps": 4, "num_stages": 2}


def plan_stem(
    sizes: tuple[int, int, int, int],
    strides: tuple[int, ...],
    out_channels: int,
    padding: Padding,
    activation: Activation,
    dtype: torch.dtype,
) -> Launch:
    """The launch for x of `sizes` (N, C, H, W) and `strides`: arithmetic alone, on any machine."""
    batch, channels, height, width = sizes
    top, left, bottom, right = padding
    height_out = output_size(height, 3, 2, top, bottom)
    width_out = output_size(width, 3, 2, left, right)
    pixels = batch * height_out * width_out
    out_tile = _out_tile(out_channels)
    curve, clip = curve_and_clip(activation)
    # From the first element of an image to the last one, with what lies in the padding.
    extent = sum((n + 4) * stride for n, stride in zip(sizes[1:], strides[1:], strict=True))
    return Launch(
        programs=-(-pixels // _STEM_PIXELS) * -(-out_channels // out_tile),
        sizes=(pixels, height, width, height_out, width_out, *strides),
        bounds=clip,
        constants={
            "C_IN": channels,
            "C_OUT": out_channels,
            "PAD_TOP": top,
            "PAD_LEFT": left,
            "CURVE": curve,
            "WIDE": max(extent, pixels + _STEM_PIXELS) >= 2**31,
            "PRECISION": precision(dtype),
            "PIXELS": _STEM_PIXELS,
            "TERMS": min(64, triton.next_power_of_2(9 * channels)),
            "OUT_TILE": out_tile,
        },
    )


def plan_pooled(
    sizes: tuple[int, int, int, int],
    out_channels: int,
    activation: Activation,
    dtype: torch.dtype,
) -> Launch:
    """The launch for x of `sizes` (N, C, H, W): arithmetic alone, on any machine."""
    batch, channels, height, width = sizes
    out_tile = _out_tile(out_channels)
    curve, clip = curve_and_clip(activation)
    return Launch(
        programs=batch * -(-out_channels // out_tile),
        sizes=(height * width,),
        bounds=clip,
        constants={
            "C_IN": channels,
            "C_OUT": out_channels,
            "CURVE": curve,
            "PRECISION": precision(dtype),
            "PIXELS": max(16, min(64, triton.next_power_of_2(height * width))),
            "CHUNK": max(16, min(128 // dtype.itemsize, triton.next_power_of_2(channels))),
            "OUT_TILE": out_tile,
        },
    )


def stem(
    x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, activation: Activation
) -> Tensor:
    """3x3, stride 2, then a clip or a curve, on x's device or in the interpreter.

    x (N, C_in, H, W) in any layout; weight (3, 3, C_in, C_out), the columns of the window first;
    bias (C_out,). The result is channels_last.
    """
    out_channels = weight.shape[3]
    launch = plan_stem(tuple(x.shape), x.stride(), out_channels, padding, activation, x.dtype)
    shape = (x.shape[0], out_channels, *launch.sizes[3:5])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() > 0:
        run(stem_kernel, (x, weight, bias, y), launch, STEM_OPTIONS)
    return y


def pooled(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """1x1, a clip or a curve, then the mean over all pixels: (N, C_in, H, W) -> (N, C_out).

    weight (C_in, C_out), bias (C_out,).
    """
    launch = plan_pooled(tuple(x.shape), weight.shape[1], activation, x.dtype)
    y = x.new_empty((x.shape[0], weight.shape[1]))
    if y.numel() > 0:
        x = x.contiguous(memory_format=torch.channels_last)
        run(pooled_kernel, (x, weight, bias, y), launch, POOLED_OPTIONS)
    return y


def _out_tile(out_channels: int) -> int:
    return max(16, min(64, triton.next_power_of_2(out_channels)))
