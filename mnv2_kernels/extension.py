"""The compiled extension, `mnv2_kernels._C`, or the reason why there is none."""

from importlib import import_module
from types import ModuleType

module: ModuleType | None
missing: str | None
try:
    # Loading it registers the CPU kernels with PyTorch's dispatcher.
    module = import_module("mnv2_kernels._C")
    missing = None
except ImportError as error:
    module = None
    missing = (
        f"the compiled extension is not available ({error});"
        " install it with a C++ compiler and pip's --no-build-isolation"
    )
