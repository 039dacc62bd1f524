"""The block in three Triton kernels, expanded tensor in memory: what fusion itself is measured by.

As much care as the fused kernel gets, short of fusing: batch norm folded, epilogues fused, tiles
tuned for every shape on the GPU at hand. On CPU tensors Triton's interpreter runs it.
"""

import importlib.util
from functools import cache, partial
from math import gcd

import numpy as np
import torch
import triton
import triton.testing
from torch import Tensor, nn

from mnv2_kernels.block.config import output_size
from mnv2_kernels.profiling.variants import fused_blocks

from . import unfused_kernels

POINTWISE_CONFIGS = [
    triton.Config(
        {"PIXELS": pixels, "OUT_TILE": out, "IN_TILE": into}, num_warps=warps, num_stages=stages
    )
    for pixels, out, into, warps, stages in (
        (128, 128, 32, 8, 3),
        (128, 64, 32, 4, 3),
        (256, 32, 32, 8, 3),
        (128, 32, 64, 4, 3),
        (128, 16, 32, 4, 3),
        (64, 64, 64, 4, 4),
        (32, 32, 128, 4, 3),
        (16, 64, 64, 4, 4),
    )
]
DEPTHWISE_CONFIGS = [
    triton.Config(
        {"ROWS": rows, "COLUMNS": columns, "CHANNELS": channels}, num_warps=warps, num_stages=1
    )
    for rows, columns, channels, warps in (
        (4, 32, 32, 4),
        (4, 16, 64, 4),
        (4, 16, 32, 2),
        (7, 8, 64, 4),
        (2, 8, 64, 2),
        (1, 8, 64, 2),
    )
]
# The interpreter needs no tuning, and has no GPU to tune on.
INTERPRETED_POINTWISE = {"PIXELS": 32, "OUT_TILE": 32, "IN_TILE": 16}
INTERPRETED_DEPTHWISE = {"ROWS": 2, "COLUMNS": 8, "CHANNELS": 32}


def inverted_residual(
    x: Tensor,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    w_dw: Tensor,
    b_dw: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    stride: int,
    padding: tuple[int, int, int, int],
    dilation: int,
    residual: bool,
    clip_expand: tuple[float, float],
    clip_dw: tuple[float, float],
    clip_project: tuple[float, float],
) -> Tensor:
    """The op `mnv2::inverted_residual` in three launches, two without expansion.

    x (N, C_in, H, W), float16, bfloat16 or float32, dense channels_last; the arguments are the
    op's. Hidden tensors have x's dtype. Returns (N, C_out, H_out, W_out), channels_last.

    Raises:
        ValueError: x is not dense channels_last.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("unfused: x must be dense channels_last, got other strides")
    h = x
    if w_expand is not None:
        h = _pointwise(h, w_expand, b_expand, clip_expand, None)
    h = _depthwise(h, w_dw, b_dw, clip_dw, stride, padding, dilation)
    return _pointwise(h, w_project, b_project, clip_project, x if residual else None)


def _pointwise(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    clip: tuple[float, float],
    shortcut: Tensor | None,
) -> Tensor:
    batch, _, height, width = x.shape
    c_in, c_out = w.shape
    y = _empty(x, (batch, c_out, height, width))
    pixels = batch * height * width
    in_unit, out_unit = gcd(c_in, 16), gcd(c_out, 16)
    arguments = (
        x,
        w,
        w if bias is None else bias,
        y if shortcut is None else shortcut,
        y,
        pixels,
        c_in // in_unit,
        c_out // out_unit,
        *clip,
    )
    constants = {
        "IN_UNIT": in_unit,
        "OUT_UNIT": out_unit,
        "BIAS": bias is not None,
        "RESIDUAL": shortcut is not None,
        "LOOP_END": None if x.is_cuda else c_in,
    }

    def grid(meta: dict) -> tuple[int]:
        return (-(-pixels // meta["PIXELS"]) * -(-c_out // meta["OUT_TILE"]),)

    _launch("pointwise", grid, arguments, constants, x.is_cuda)
    return y


def _depthwise(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    clip: tuple[float, float],
    stride: int,
    padding: tuple[int, int, int, int],
    dilation: int,
) -> Tensor:
    batch, channels, height, width = x.shape
    kernel = w.shape[0]
    top, left, bottom, right = padding
    height_out = output_size(height, kernel, stride, top, bottom, dilation)
    width_out = output_size(width, kernel, stride, left, right, dilation)
    y = _empty(x, (batch, channels, height_out, width_out))
    unit = gcd(channels, 16)
    sizes = (height, width, height_out, width_out)
    arguments = (x, w, w if bias is None else bias, y, *sizes, channels // unit, *clip)
    constants = {
        "UNIT": unit,
        "BIAS": bias is not None,
        "KERNEL": kernel,
        "STRIDE": stride,
        "DILATION": dilation,
        "PAD_TOP": top,
        "PAD_LEFT": left,
    }

    def grid(meta: dict) -> tuple[int]:
        tiles = -(-height_out // meta["ROWS"]) * -(-width_out // meta["COLUMNS"])
        return (batch * tiles * -(-channels // meta["CHANNELS"]),)

    _launch("depthwise", grid, arguments, constants, x.is_cuda)
    return y


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _launch(name: str, grid, arguments: tuple, constants: dict, on_gpu: bool) -> None:
    if on_gpu:
        _tuned()[name][grid](*arguments, **constants)
        return
    tiles = {"pointwise": INTERPRETED_POINTWISE, "depthwise": INTERPRETED_DEPTHWISE}[name]
    with np.errstate(all="ignore"):
        getattr(_interpreted(), name)[grid](*arguments, **constants, **tiles)


@cache
def _tuned() -> dict[str, triton.runtime.Autotuner]:
    """Both kernels, tuned at the first call of a shape; kept on disk for the next process."""
    bench = partial(triton.testing.do_bench, warmup=2, rep=10)
    pointwise_key = ["pixels", "in_units", "out_units", "IN_UNIT", "OUT_UNIT", "RESIDUAL"]
    depthwise_key = ["H", "W", "H_out", "W_out", "units", "UNIT", "STRIDE", "KERNEL"]
    tune = partial(triton.autotune, do_bench=bench, cache_results=True)
    return {
        "pointwise": tune(POINTWISE_CONFIGS, pointwise_key)(unfused_kernels.pointwise),
        "depthwise": tune(DEPTHWISE_CONFIGS, depthwise_key)(unfused_kernels.depthwise),
    }


@cache
def _interpreted():
    """A second copy of the kernels, decorated for the interpreter."""
    spec = importlib.util.find_spec("benchmarks.gpu.unfused_kernels")
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


class UnfusedBlock(nn.Module):
    """A block of a fused network, run in three kernels: x (N, C_in, H, W) -> y, channels_last."""

    def __init__(self, arguments: tuple):
        super().__init__()
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        return inverted_residual(x.contiguous(memory_format=torch.channels_last), *self.arguments)


def unfuse(model: nn.Module) -> nn.Module:
    """A fused model, in place, with three kernels a block; the model itself where it is a block.

    Weights are those on the device and in the dtype that the model has now.
    """
    for name, block in fused_blocks(model).items():
        unfused = UnfusedBlock(block.folded_arguments())
        if not name:
            return unfused
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, unfused)
    return model
