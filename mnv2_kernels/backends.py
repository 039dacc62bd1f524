"""Which implementation runs a call: an ordered list, and a sentence where one cannot.

A backend is a kernel behind `torch.ops.mnv2.inverted_residual` on one device, or the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import triton_kernels
from .extension import missing
from .extension import module as _C


@dataclass(frozen=True)
class Backend:
    """`why_not(x)` is None where the backend runs on x by itself, otherwise the sentence to show.

    x None asks about the machine alone. `why_not_asked`, where it differs, is the same for a
    backend that was asked for by name.
    """

    name: str
    why_not: Callable[[Tensor | None], str | None]
    why_not_asked: Callable[[Tensor | None], str | None] | None = None

    def why_refused(self, x: Tensor | None) -> str | None:
        """None where the backend can run on x if asked for by name."""
        return (self.why_not_asked or self.why_not)(x)


def _why_not_cpu(x: Tensor | None) -> str | None:
    if missing is not None:
        return missing
    if x is None:
        return None
    if x.device.type != "cpu":
        return f"x must be on the CPU, got {x.device}"
    if x.dtype != torch.float32:
        return f"x must be float32, got {x.dtype}"
    return None


def _why_not_triton(x: Tensor | None) -> str | None:
    if x is not None and x.device.type == "cpu":
        return (
            "x must be on a GPU, got cpu; there Triton's slow interpreter runs the kernel if"
            " backend='triton' asks for it"
        )
    reason = _why_not_triton_asked(x)
    if reason is None and x is not None and x.dtype == torch.float32 and not _tf32_allowed():
        return (
            "x is float32, for which the kernel has no tensor cores until"
            " torch.backends.cuda.matmul.fp32_precision is 'tf32'; backend='triton' runs it anyway"
        )
    return reason


def _why_not_triton_asked(x: Tensor | None) -> str | None:
    if triton_kernels.missing is not None:
        return triton_kernels.missing
    if x is None:
        return None
    if x.device.type not in ("cpu", "cuda"):
        return f"x must be on a GPU, or on the CPU for Triton's interpreter, got {x.device}"
    if x.is_cuda and (reason := _why_not_gpu(x.device)) is not None:
        return reason
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x must be float32, float16 or bfloat16, got {x.dtype}"
    return None


def _asked_once_a_graph(question: Callable) -> Callable:
    """The compiler cannot trace such questions; it takes the answer of the moment it compiles.

    As `torch.compiler.assume_constant_result`, which imports the compiler: that takes a second.
    """
    question._dynamo_marked_constant = True
    return question


@_asked_once_a_graph
def _tf32_allowed() -> bool:
    return triton_kernels.precision(torch.float32) == "tf32"


@_asked_once_a_graph
def _why_not_gpu(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "x must be on an NVIDIA GPU, got one of AMD"
    # Traced without a GPU, for another machine.
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"x must be on a GPU of compute capability 8.0 or later, got {major}.{minor}"
    return None


BACKENDS = (
    Backend("cpu", _why_not_cpu),
    Backend("triton", _why_not_triton, _why_not_triton_asked),
    Backend("reference", lambda x: None),
)

_last: str | None = None


def choose(name: str | None, x: Tensor) -> str:
    """The name of the backend that will run on x; raises where the asked-for one cannot."""
    global _last
    if name is None:
        for backend in BACKENDS:
            if backend.why_not(x) is None:
                _last = backend.name
                return _last
    backend = next((b for b in BACKENDS if b.name == name), None)
    if backend is None:
        names = ", ".join(b.name for b in BACKENDS)
        raise ValueError(f"inverted_residual: backend must be one of {names}, got {name!r}")
    reason = backend.why_refused(x)
    if reason is not None:
        raise RuntimeError(f"inverted_residual: backend {name!r} cannot run here: {reason}")
    _last = name
    return name


def why_no_kernel(x: Tensor) -> str | None:
    """None where a backend other than the reference can run on x, otherwise all the reasons."""
    reasons = [b.why_not(x) for b in BACKENDS if b.name != "reference"]
    return "; ".join(reasons) if all(reasons) else None


def last_backend() -> str | None:
    """Name of the backend that `choose` returned last in this process: for tests and diagnosis."""
    return _last


def backends() -> dict[str, str]:
    """Every backend by name, with what it runs on here or the reason why it cannot."""
    report = {}
    for backend in BACKENDS:
        reason = backend.why_refused(None)
        report[backend.name] = f"cannot run: {reason}" if reason else _describe(backend.name)
    return report


def _describe(name: str) -> str:
    if name == "reference":
        return "plain PyTorch, any device and floating dtype"
    if name == "triton":
        where = "NVIDIA GPUs" if torch.cuda.is_available() else "no GPU here: interpreter alone"
        return f"float16, bfloat16 and float32, Triton {triton_kernels.version} ({where})"
    kernels = _C.cpu_kernels()
    used = next(k["name"] for k in kernels if k["selected"])
    return f"float32, {used} (built for: {', '.join(k['name'] for k in kernels)})"


def load(library: torch.library.Library) -> None:
    """Give the op a CPU kernel that says what is missing, where there is no compiled one.

    Importing the extension has registered its kernels with the dispatcher already.
    """
    if missing is not None:

        def unavailable(*args):
            raise RuntimeError(f"inverted_residual: {missing}")

        library.impl("inverted_residual", unavailable, "CPU")
