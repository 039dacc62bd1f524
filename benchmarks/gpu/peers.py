"""Who is timed on a GPU: one function a provider, from a model to something to call.

Every provider gets the same float32 model, whose parameters hold values of x's dtype, and an
example x (N, C, H, W) in channels_last; it returns a callable that gives the model's result for any
such x.
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import mnv2_kernels as mk
from mnv2_kernels.profiling.variants import fused_blocks, plain, variants

from .part import NO_TIME
from .timing import Graph
from .unfused_triton import unfuse

Call = Callable[[Tensor], Tensor]
NEEDS_GPU = "needs a GPU"


class OutOfTime(BaseException):
    """A provider took too long to build; no Exception, so that no compiler swallows it."""


def _like(model: nn.Module, x: Tensor) -> nn.Module:
    return model.to(device=x.device, dtype=x.dtype, memory_format=torch.channels_last)


def eager(model: nn.Module, x: Tensor) -> Call:
    """Layer by layer as written."""
    return _like(plain(model), x)


def folded(model: nn.Module, x: Tensor) -> Call:
    """Layer by layer, batch norm folded into the convolutions in float32, then rounded."""
    return _like(variants(model)["folded"], x)


def fused(model: nn.Module, x: Tensor) -> Call:
    """Ours, with the backend that each block takes by itself; on a CPU Triton's interpreter."""
    return _like(variants(model)["fused"], x) if x.is_cuda else fused_triton(model, x)


def fused_cuda(model: nn.Module, x: Tensor) -> Call:
    """Ours, every block in a CUDA kernel."""
    _needs_gpu(x)
    return _fused_by("cuda", model, x)


def fused_triton(model: nn.Module, x: Tensor) -> Call:
    """Ours, every block in the Triton kernel; on a CPU in its interpreter."""
    return _fused_by("triton", model, x)


def _fused_by(backend: str, model: nn.Module, x: Tensor) -> Call:
    copy = _like(variants(model)["fused"], x)
    for block in fused_blocks(copy).values():
        block.backend = backend
    return copy


def planned(model: nn.Module, x: Tensor) -> Call:
    """Ours as a plan: stem and last convolution in a kernel each, too."""
    return mk.plan(variants(model)["fused"].to(x.device), x.shape[1:], dtype=x.dtype)


def unfused(model: nn.Module, x: Tensor) -> Call:
    """Ours but for fusion: every block in three Triton kernels."""
    return unfuse(_like(variants(model)["fused"], x))


def compiled(model: nn.Module, x: Tensor) -> Call:
    """torch.compile at its best: tuned kernels, in CUDA graphs of its own."""
    _needs_gpu(x)
    call = torch.compile(eager(model, x), mode="max-autotune", dynamic=False)
    with torch.inference_mode():
        call(x)
    return call


def compiled_frozen(model: nn.Module, x: Tensor) -> Call:
    """The same with inductor's freezing, which folds batch norm."""
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        return compiled(model, x)


def graphed(provider: Callable[[nn.Module, Tensor], Call]) -> Callable[[nn.Module, Tensor], Call]:
    """The provider in a CUDA graph; x is copied to where the graph reads it."""

    def build(model: nn.Module, x: Tensor) -> Call:
        _needs_gpu(x)
        inside = x.clone()
        inner = provider(model, x)
        with torch.inference_mode():
            graph = Graph(inner, [inside])

        def call(x: Tensor) -> Tensor:
            inside.copy_(x)
            graph.replay()
            return graph.outputs[0]

        return call

    return build


def _needs_gpu(x: Tensor) -> None:
    if not x.is_cuda:
        raise RuntimeError(NEEDS_GPU)


BLOCK_PROVIDERS = {
    "fused": fused,
    "fused-cuda": fused_cuda,
    "fused-triton": fused_triton,
    "unfused": unfused,
    "folded": folded,
    "eager": eager,
}
_CALLED = {"planned": planned, **BLOCK_PROVIDERS}
# Those that compile come last: the others are measured whatever becomes of them.
NETWORK_PROVIDERS = {
    **_CALLED,
    **{f"{name}-graph": graphed(build) for name, build in _CALLED.items()},
    "compiled-frozen": compiled_frozen,
    "compiled": compiled,
}
# By which traffic of `roofline` each is judged.
EXECUTIONS = {
    "planned": "fused",
    "fused": "fused",
    "fused-cuda": "fused",
    "fused-triton": "fused",
    "unfused": "folded",
    "folded": "folded",
    "eager": "eager",
    "compiled": "folded",
    "compiled-frozen": "folded",
}


def execution(provider: str) -> str:
    """The execution whose floor a provider is held against."""
    return EXECUTIONS[provider.removesuffix("-graph")]


@torch.no_grad()
def build(
    providers: dict[str, Callable[[nn.Module, Tensor], Call]],
    model: nn.Module,
    x: Tensor,
    *,
    seconds: Callable[[], float],
) -> tuple[dict[str, Call], dict[str, str]]:
    """(what was built by name, why the others were not).

    `seconds()` is what the next provider may take; it is called before each. Models are built
    outside of inference mode, since compilers handle no parameters made in it.
    """
    calls: dict[str, Call] = {}
    errors: dict[str, str] = {}
    for name, make in providers.items():
        allowed = seconds()
        try:
            if allowed <= 0:
                raise OutOfTime(f"{NO_TIME} to build it")
            with time_limit(allowed):
                calls[name] = make(model, x)
        except (Exception, OutOfTime) as error:
            errors[name] = sentence(error)
            print(f"{name}: {errors[name]}", flush=True)
    return calls, errors


def sentence(error: BaseException, length: int = 400) -> str:
    """An error in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else text[:length] + " ..."


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in this block after that many seconds; for the main thread."""

    def stop(number, frame):
        raise OutOfTime(f"not built within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def lost(errors: Iterable[str]) -> bool:
    """Whether an error says that the process can no longer use the GPU."""
    signs = ("illegal memory access", "misaligned address", "unspecified launch failure")
    return any(sign in error for error in errors for sign in signs)
