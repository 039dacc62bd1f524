"""The patch kernel in Triton's interpreter: on CPU tensors, for tests and for reading along."""

import importlib.util
from functools import cache
from threading import Lock

import triton

from ..optional import require

# The interpreter replaces functions of triton.language while it runs.
_lock = Lock()


def run(grid: tuple[int], arguments: tuple, constants: dict) -> None:
    """Run the kernel, program by program.

    Raises:
        MissingPackage: Triton's interpreter needs NumPy, and there is none.
    """
    require("numpy")
    import numpy as np

    # Infinities and NaNs are as welcome as on a GPU.
    with _lock, np.errstate(all="ignore"):
        _kernel()[grid](*arguments, **constants)


@cache
def _kernel():
    """A second copy of the kernel, decorated for the interpreter whatever TRITON_INTERPRET says."""
    spec = importlib.util.find_spec("mnv2_kernels.ops.triton.patch")
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module.inverted_residual_patch
