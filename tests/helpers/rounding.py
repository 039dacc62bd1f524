"""What the CPU kernels compute in 16 bits: the block in float32, rounded once at its end.

Where bfloat16 numbers are multiplied in pairs, the results of the depthwise are rounded too. So the
exact value, with that step in place, is known to half a unit in the last place, which finds what a
comparison with PyTorch's own errors would pass.
"""

from dataclasses import replace

import torch
from cases import Case, Expected
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP
from mnv2_kernels.ops import reference
from mnv2_kernels.ops.extension import module as _C

# What sums in float32 may differ by, of the largest exact value or of 1.
SLACK = 1e-6


def multiplies_pairs(case: Case, dtype: torch.dtype) -> bool:
    """Whether the CPU kernel in use multiplies this block's numbers two at a time."""
    selected = next(kernel for kernel in _C.cpu_kernels() if kernel["selected"])
    config = case.config
    even = config.in_channels % 2 == 0 and config.hidden_channels % 2 == 0
    return selected["pairs"] and even and dtype == torch.bfloat16


def _unclipped(case: Case, x: Tensor, weights: FoldedWeights) -> Tensor:
    """The projection in float64, before its clip and the residual."""
    settings = case.settings | {"residual": False}
    return reference.inverted_residual(
        x.double(), replace(weights.to(torch.float64), clip_project=NO_CLIP), **settings
    )


def _unclipped_in_pairs(case: Case, x: Tensor, weights: FoldedWeights) -> tuple[Tensor, Tensor]:
    """The same of a depthwise whose results are rounded; and how far off each element may be.

    Now and then such a result lies between two bfloat16 numbers, and is rounded to the other one.
    """
    identity = torch.eye(case.config.hidden_channels, dtype=weights.w_project.dtype)
    h = _unclipped(case, x, replace(weights, w_project=identity, b_project=None))
    margin = SLACK * h.abs().max().clamp_min(1)
    apart = (h + margin).bfloat16().double() - (h - margin).bfloat16().double()
    w = weights.w_project.double()
    y = torch.einsum("nchw,cd->ndhw", h.bfloat16().double(), w)
    if weights.b_project is not None:
        y += weights.b_project.double()[:, None, None]
    return y, torch.einsum("nchw,cd->ndhw", apart, w.abs())


def why_not_rounded_once(
    y: Tensor, expected: Expected, case: Case, x: Tensor, weights: FoldedWeights
) -> str | None:
    """None where every element of y is the exact value rounded to x's dtype, otherwise how far.

    `expected` is `cases.expect(case, x, weights)`.
    """
    if y.dtype != x.dtype:
        return f"{y.dtype}, not {x.dtype}"
    if y.numel() == 0:
        return None
    if multiplies_pairs(case, x.dtype):
        unclipped, slack = _unclipped_in_pairs(case, x, weights)
        truth = unclipped.clamp(*weights.clip_project)
        truth = truth + x.double() if case.config.residual else truth
    else:
        unclipped, truth = _unclipped(case, x, weights), expected.truth
        slack = torch.zeros_like(truth)
    # What is summed up has a size near 1 or is larger, also where a clip leaves little of the sum.
    scale = torch.stack([truth.abs().max(), unclipped.abs().max()]).max().clamp_min(1)
    slack += SLACK * scale
    error, info = (y.double() - truth).abs(), torch.finfo(x.dtype)
    half_unit = info.eps / 2 * truth.abs().clamp_min(info.smallest_normal)
    beyond = error - half_unit - slack
    if beyond.max() > 0:
        allowed = slack.flatten()[beyond.argmax()]
        return f"{beyond.max() + allowed:.1e} beyond one rounding (allowed {allowed:.1e})"
    once = (truth.to(x.dtype).double() - truth).abs().mean() + slack.mean()
    if error.mean() > 1.02 * once:
        return f"mean error {error.mean():.2e}, of one rounding {once:.2e}"
    return None
