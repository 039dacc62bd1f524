"""The block with NaN and infinities in it: what must come out, and where."""

from dataclasses import replace
from itertools import product

import cases
import torch
from cases import Case, why_wrong
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import BlockConfig


def skipping_reference(x: Tensor, weights: FoldedWeights, case: Case) -> Tensor:
    """The block in float64 where a tap outside the image is left out, not multiplied by zero."""
    config, weights = case.config, weights.to(torch.float64)
    h = x.double()
    if weights.w_expand is not None:
        h = _linear(h, weights.w_expand, weights.b_expand).clamp(*weights.clip_expand)
    size = config.output_hw(*h.shape[2:])
    summed = h.new_zeros(len(h), config.hidden_channels, *size)
    for i, j in product(range(config.kernel_size), repeat=2):
        rows, rows_in = _inside(i, config, config.padding[0], h.shape[2], size[0])
        columns, columns_in = _inside(j, config, config.padding[1], h.shape[3], size[1])
        tap = weights.w_dw[i, j, :, None, None]
        summed[:, :, rows, columns] += tap * h[:, :, rows_in, columns_in]
    if weights.b_dw is not None:
        summed += weights.b_dw[:, None, None]
    y = _linear(summed.clamp(*weights.clip_dw), weights.w_project, weights.b_project)
    y = y.clamp(*weights.clip_project)
    return y + x.double() if config.residual else y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum("nchw,cd->ndhw", x, weight)
    return y if bias is None else y + bias[:, None, None]


def _inside(
    tap: int, config: BlockConfig, padding: int, size_in: int, size_out: int
) -> tuple[slice, slice]:
    """The outputs whose tap is inside the image, and the inputs it reads for them."""
    shift, stride = tap * config.dilation - padding, config.stride
    first = max(0, -(shift // stride))
    count = max(0, min(size_out, (size_in - 1 - shift) // stride + 1) - first)
    start = first * stride + shift if count else 0
    return slice(first, first + count), slice(start, start + stride * count, stride)


def why_unlike(y: Tensor, truth: Tensor, clean: cases.Expected) -> str | None:
    """NaN and infinities exactly where the truth has them, the rest as near as clean inputs."""
    if not torch.equal(y.isnan(), truth.isnan()):
        return f"NaN at {_where(y.isnan())}, not at {_where(truth.isnan())}"
    if not torch.equal(
        y.isposinf() * 1 - y.isneginf() * 1, truth.isposinf() * 1 - truth.isneginf() * 1
    ):
        return f"infinite at {_where(y.isinf())}, not at {_where(truth.isinf())}"
    finite = truth.isfinite()
    return why_wrong(y.where(finite, 0), replace(clean, truth=truth.where(finite, 0)))


def _where(mask: Tensor) -> str:
    return f"{mask.sum().item()} places from {mask.nonzero()[:4].tolist()}"
