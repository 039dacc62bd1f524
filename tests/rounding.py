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

# Of the largest exact value: what sums in float32 may differ by, and what a rare result of the
# depthwise may that lies between two bfloat16 numbers and is rounded to the other one.
SINGLE_SLACK, PAIRS_SLACK = 1e-6, 1e-3


def multiplies_pairs(case: Case, dtype: torch.dtype) -> bool:
    """Whether the CPU kernel in use multiplies this block's numbers two at a time."""
    selected = next(kernel["name"] for kernel in _C.cpu_kernels() if kernel["selected"])
    can = selected == "avx512" and torch.cpu._is_avx512_bf16_supported()
    config = case.config
    even = config.in_channels % 2 == 0 and config.hidden_channels % 2 == 0
    return can and even and dtype == torch.bfloat16


def _exact_in_pairs(case: Case, x: Tensor, weights: FoldedWeights) -> Tensor:
    """The block in float64, but for the results of the depthwise."""
    weights, settings = weights.to(torch.float64), case.settings | {"residual": False}
    identity = torch.eye(case.config.hidden_channels, dtype=torch.float64)
    depthwise = replace(weights, w_project=identity, b_project=None, clip_project=NO_CLIP)
    h = reference.inverted_residual(x.double(), depthwise, **settings).bfloat16().double()
    y = torch.einsum("nchw,cd->ndhw", h, weights.w_project)
    if weights.b_project is not None:
        y += weights.b_project[:, None, None]
    y = y.clamp(*weights.clip_project)
    return y + x.double() if case.config.residual else y


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
    truth = _exact_in_pairs(case, x, weights) if pairs else expected.truth
    error, scale = (y.double() - truth).abs(), truth.abs().max()
    info = torch.finfo(x.dtype)
    half_unit = info.eps / 2 * truth.abs().clamp_min(info.smallest_normal)
    beyond = ((error - half_unit).max() / scale).item()
    allowed = PAIRS_SLACK if pairs else SINGLE_SLACK
    if beyond > allowed:
        return f"{beyond:.1e} of the largest value beyond one rounding (allowed {allowed:.0e})"
    once = (truth.to(x.dtype).double() - truth).abs().mean() + SINGLE_SLACK * scale
    if error.mean() > 1.02 * once:
        return f"mean error {error.mean():.2e}, of one rounding {once:.2e}"
    return None
