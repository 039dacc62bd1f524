"""Which implementation runs a call: an ordered list, and a sentence where one cannot.

A backend is a kernel behind `torch.ops.mnv2.inverted_residual` on one device, or the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .extension import missing
from .extension import module as _C


@dataclass(frozen=True)
class Backend:
    """`why_not(x)` is None where the backend can run on x, otherwise the sentence to show.

    x None asks about the machine alone.
    """

    name: str
    why_not: Callable[[Tensor | None], str | None]


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


BACKENDS = (
    Backend("cpu", _why_not_cpu),
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
    reason = backend.why_not(x)
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
        reason = backend.why_not(None)
        report[backend.name] = f"cannot run: {reason}" if reason else _describe(backend.name)
    return report


def _describe(name: str) -> str:
    if name != "cpu":
        return "plain PyTorch, any device and floating dtype"
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
