"""What the CPU kernels compute in 16 bits: the block in float32, rounded once at its end.

Where bfloat16 numbers are multiplied in pairs (AVX512-BF16), the results of the depthwise are
rounded too. So the exact value, with that step in place, is known to half a unit in the last place,
which finds what a comparison with PyTorch's own errors would pass.
"""

from dataclasses import replace

import torch
from cases import Case, Expected
from torch import Tensor

from mnv2_kernels import FoldedWeights, reference
from mnv2_kernels.block import NO_CLIP
from mnv2_kernels.extension import module as _C

# What sums in float32 may differ by, of the largest exact value or of 1.
SLACK = 1e-6


def multiplies_pairs(case: Case, dtype: torch.dtype) -> bool:
    """Whether the CPU kernel in use multiplies this block's numbers two at a time."""
    selected = next(kernel["name"] for kernel in _C.cpu_kernels() if kernel["selected"])
    can = selected == "avx512" and torch.cpu._is_avx512_bf16_supported()
    config = case.config
    even = config.in_channels % 2 == 0 and config.hidden_channels % 2 == 0
    return can and even and dtype == torch.bfloat16


def _exact_in_pairs(case: Case, x: Tensor, weights: FoldedWeights) -> tuple[Tensor, float]:
    """The block in float64, but for the results of the depthwise; and what one of these is worth.

    Now and then one lies between two bfloat16 numbers, and is rounded to the other of them.
    """
    weights, settings = weights.to(torch.float64), case.settings | {"residual": False}
    identity = torch.eye(case.config.hidden_channels, dtype=torch.float64)
    depthwise = replace(weights, w_project=identity, b_project=None, clip_project=NO_CLIP)
    h = reference.inverted_residual(x.double(), depthwise, **settings).bfloat16().double()
    y = torch.einsum("nchw,cd->ndhw", h, weights.w_project)
    if weights.b_project is not None:
        y += weights.b_project[:, None, None]
    y = y.clamp(*weights.clip_project)
    one = torch.finfo(torch.bfloat16).eps * (h.abs().max() * weights.w_project.abs().max()).item()
    return (y + x.double() if case.config.residual else y), one


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
    pairs = multiplies_pairs(case, x.dtype)
    truth, slack = _exact_in_pairs(case, x, weights) if pairs else (expected.truth, 0.0)
    # What is summed up has a size near 1, also where a clip leaves little of the sum.
    error, scale = (y.double() - truth).abs(), truth.abs().max().clamp_min(1)
    info = torch.finfo(x.dtype)
    half_unit = info.eps / 2 * truth.abs().clamp_min(info.smallest_normal)
    slack += SLACK * scale.item()
    beyond = (error - half_unit).max().item()
    if beyond > slack:
        return f"{beyond:.1e} beyond one rounding (allowed {slack:.1e})"
    once = (truth.to(x.dtype).double() - truth).abs().mean() + SLACK * scale
    if error.mean() > 1.02 * once:
        return f"mean error {error.mean():.2e}, of one rounding {once:.2e}"
    return None
