"""Is a peer's result right? By the dtype that it computes in."""

import torch
from torch import Tensor, nn

from .. import harness
from .cases import folded

# Relative to PyTorch's own layers in bfloat16: other sums, the same roundings.
BFLOAT16_FACTOR = 2.0


def error_of(y: Tensor, expected: Tensor, precision: str, rounding: float | None) -> float:
    """Error over value: the largest ones in float32, L2 norms in bfloat16.

    Args:
        expected: in float64.
        rounding: `bfloat16_rounding` of the workload, for bfloat16.

    Raises:
        AssertionError: the shape is another, or it is no rounding error.
    """
    if y.shape != expected.shape:
        raise AssertionError(f"shape must be {tuple(expected.shape)}, got {tuple(y.shape)}")
    if precision == "float32":
        return harness.largest_error(y, expected)
    error = relative_norm(y, expected)
    if not error <= BFLOAT16_FACTOR * rounding:
        raise AssertionError(
            f"error must be at most {BFLOAT16_FACTOR:g} times that of PyTorch's layers in"
            f" bfloat16, {rounding:.2e}, got {error:.2e}"
        )
    return error


def bfloat16_rounding(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    """What PyTorch's layers lose in bfloat16, batch norm folded."""
    with torch.inference_mode():
        return relative_norm(folded(model).bfloat16()(x.bfloat16()), expected)


def relative_norm(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()
