"""The compiled CUDA op, csrc/torch/ops_cuda.cpp, on CPU tensors: its kernels run in the emulator.

`op()` is `torch.ops.mnv2.inverted_residual` as PyTorch's dispatcher calls it for CUDA tensors.
Loading the library replaces what is registered for those in this process.
"""

import ctypes
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import emulated_cuda
import torch
from emulated_cuda import CACHE, EMULATOR, H200, KERNELS, ROOT, EmulatorError
from torch import Tensor
from torch.utils import cpp_extension

OWN = ROOT / "tests/cuda_op_on_cpu"
SOURCES = (ROOT / "csrc/torch/ops_cuda.cpp", ROOT / "csrc/torch/host.cpp", OWN / "runtime.cpp")
_CUDA_TENSORS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def why_not() -> str | None:
    """Why the op cannot be emulated here, or None."""
    if torch.cuda.is_available():
        return "there is a GPU, for which tests/cuda/test_cuda_gpu.py runs the op itself"
    return emulated_cuda.why_not()


def compiler() -> list[str]:
    """The beginning of a command that compiles a file with PyTorch's headers."""
    # Its releases differ in the standard that they need.
    known = Path(cpp_extension.__file__).read_text()
    standard = "-std=c++20" if "-std=c++20" in known else "-std=c++17"
    folders = [*cpp_extension.include_paths(), emulated_cuda.cuda_include()]
    return ["g++", standard, "-Wall", *(f"-isystem{folder}" for folder in folders)]


def build(kernels: Path) -> Path:
    """The library of the op, on top of the kernels'. What was built from the same is taken again.

    Raises CalledProcessError where it does not compile.
    """
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = [*compiler(), "-shared", "-fPIC", "-O1", f"-I{OWN}", *map(str, SOURCES)]
    command += [str(kernels), f"-L{torch_libraries}", "-lc10", "-ltorch_cpu"]
    digest = hashlib.sha256(" ".join([torch.__version__, *command]).encode())
    headers = [p for folder in (ROOT / "csrc", OWN) for p in sorted(folder.rglob("*.h"))]
    for path in (*SOURCES, *headers):
        digest.update(path.read_bytes())
    library = CACHE / f"op-{digest.hexdigest()[:20]}.so"
    if not library.exists():
        unfinished = f"{library}.{os.getpid()}"
        subprocess.run([*command, "-o", unfinished], check=True)
        os.replace(unfinished, library)
    return library


class Op:
    """The op, loaded, on a GPU of capability 9.0 or another that `configure` names."""

    def __init__(self):
        sources = [ROOT / f"csrc/cuda/{kernel}/{kernel}.cu" for kernel in KERNELS]
        kernels = emulated_cuda.build([*sources, ROOT / "csrc/cuda/choose.cpp", *EMULATOR])
        built = build(kernels)
        torch.ops.load_library(built)
        self.emulator, self.runtime = ctypes.CDLL(str(kernels)), ctypes.CDLL(str(built))
        self.emulator.mnv2_message.restype = ctypes.c_char_p
        self.configure()

    def configure(self, shared_bytes: int = H200.shared_bytes) -> None:
        """What a launch can have from now on."""
        self.emulator.mnv2_configure(0, 1, True, shared_bytes, H200.cluster)

    def __call__(self, *arguments) -> Tensor:
        """The op's result for CPU tensors.

        Raises EmulatorError with the first thing that the kernel did wrong.
        """
        y = torch.ops.mnv2.inverted_residual.default.redispatch(_CUDA_TENSORS, *arguments)
        if message := self.emulator.mnv2_message().decode():
            raise EmulatorError(message)
        return y


@cache
def op() -> Op:
    return Op()
