"""The compiled extension, `mnv2_kernels._C`, or the reason why there is none."""

from importlib import import_module
from types import ModuleType

module: ModuleType | None
missing: str | None
# The same of the CUDA kernels, which an extension need not have.
cuda_missing: str | None
try:
    # Loading it registers the compiled kernels with PyTorch's dispatcher.
    module = import_module("mnv2_kernels._C")
    missing = None
    _why = module.build_info().get("why_no_cuda")
    cuda_missing = _why and (
        f"the CUDA kernels are not in this build ({_why}); build it again where torch has CUDA and"
        " nvcc is found"
    )
except ImportError as error:
    module = None
    missing = cuda_missing = (
        f"the compiled extension is not available ({error}); install g++ or clang++, then"
        " `pip install --force-reinstall --no-deps .` in a checkout of the project builds it"
    )
