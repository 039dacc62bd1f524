"""The kernels in Triton's interpreter: on CPU tensors, for tests and for reading along."""

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Lock
from types import ModuleType

import triton

from ..optional import require

# A second copy of the kernels' modules, named as if it were a package of its own.
_COPY = f"{__package__}_interpreted"
_FOLDER = Path(__file__).parent / "kernels"

# The interpreter replaces functions of triton.language while it runs.
_lock = Lock()


def run(name: str, grid: tuple[int], arguments: tuple, constants: dict) -> None:
    """Run the kernel of this name, program by program.

    Raises:
        MissingPackage: Triton's interpreter needs NumPy, and there is none.
    """
    require("numpy")
    import numpy as np

    # Infinities and NaNs are as welcome as on a GPU.
    with _lock, np.errstate(all="ignore"):
        _kernels()[name][grid](*arguments, **constants)


@cache
def _kernels() -> dict[str, object]:
    """The kernels by name, decorated for the interpreter whatever TRITON_INTERPRET says."""
    return load(_FOLDER, _COPY)


def load(folder: Path, package: str) -> dict[str, object]:
    """All that the kernels' modules in a folder define, for the interpreter."""
    sys.modules[package] = copy = ModuleType(package)
    copy.__path__ = [str(folder)]
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        modules = [import_module(f"{package}.{name}") for name in ("patch", "gate", "ends")]
    return {name: value for module in modules for name, value in vars(module).items()}
