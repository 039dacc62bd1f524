"""The block in Triton: kernels for fp16, bf16 and fp32, their configurations and their launches.

Nothing here imports Triton before a call needs it: PyTorch's CPU builds have none.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def missing() -> str | None:
    """Why Triton cannot be used here; None where it can, and has then been imported."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed ({error}); on Linux `pip install triton` brings it"
    return None


def version() -> str:
    """Triton's; only where it is not missing."""
    from triton import __version__

    return __version__


def precision(dtype: torch.dtype) -> str:
    """How products of matrices are computed: as IEEE says, or in TF32 where PyTorch allows it."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def inverted_residual(*arguments) -> Tensor:
    """`launch.inverted_residual`, or RuntimeError where there is no Triton."""
    if missing() is not None:
        raise RuntimeError(f"inverted_residual: {missing()}")
    from . import launch

    return launch.inverted_residual(*arguments)


def mbconv(*arguments) -> Tensor:
    """`launch_gate.mbconv`, or RuntimeError where there is no Triton."""
    if missing() is not None:
        raise RuntimeError(f"mbconv: {missing()}")
    from . import launch_gate

    return launch_gate.mbconv(*arguments)


def stem(*arguments) -> Tensor:
    """`launch_ends.stem`; Triton must not be missing."""
    from . import launch_ends

    return launch_ends.stem(*arguments)


def pooled(*arguments) -> Tensor:
    """`launch_ends.pooled`; Triton must not be missing."""
    from . import launch_ends

    return launch_ends.pooled(*arguments)
