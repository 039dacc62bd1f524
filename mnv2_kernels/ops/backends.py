"""Which implementation runs a call: an ordered list, and a sentence where one cannot.

A backend is the kernels of `torch.ops.mnv2.inverted_residual` and `torch.ops.mnv2.mbconv` on one
device, or the reference.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from ..block.config import Activation, BlockConfig, Padding
from . import triton
from .extension import cuda_missing, missing
from .extension import module as _C

# What kernels run on by themselves; without the extension there is none for a CPU.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DEVICES = ("cuda",) if missing is not None else ("cuda", "cpu")

_Question = TypeVar("_Question", bound=Callable[..., Any])


class Block(NamedTuple):
    """What a kernel is chosen by, besides x: plain values, which can be hashed and traced."""

    in_channels: int
    hidden_channels: int
    out_channels: int
    expansion: bool
    kernel_size: int
    stride: int
    dilation: int
    padding: Padding
    residual: bool
    clip_expand: Activation
    clip_dw: Activation
    clip_project: Activation
    gate: bool
    dense: bool

    @classmethod
    def of(cls, config: BlockConfig, clips: tuple[Activation, Activation, Activation]) -> "Block":
        names = cls._fields[:-5]
        sizes = (getattr(config, name) for name in names)
        return cls(*sizes, *clips, gate=config.squeeze_channels > 0, dense=config.dense)


@dataclass(frozen=True)
class Backend:
    """`why_not(x, block)` is None where the backend runs by itself, otherwise the sentence to show.

    x None asks about the machine alone, block None about x alone. `why_not_asked`, where it
    differs, is the same for a backend that the user has named.
    """

    name: str
    why_not: Callable[..., str | None]
    why_not_asked: Callable[..., str | None] | None = None

    def why_refused(self, x: Tensor | None, block: Block | None = None) -> str | None:
        """None where the backend can run on x if the user names it."""
        return (self.why_not_asked or self.why_not)(x, block)


def _why_not_cpu(x: Tensor | None, block: Block | None = None) -> str | None:
    if missing is not None:
        return missing
    if x is None:
        return None
    if x.device.type != "cpu":
        return f"x must be on the CPU, got {x.device}"
    return _why_not_dtype(x)


def _why_not_cuda(x: Tensor | None, block: Block | None = None) -> str | None:
    reason = _why_not_cuda_asked(x, block)
    if reason is not None or x is None:
        return reason
    if x.dtype == torch.float32:
        slow = "float32"
    elif block is not None and cuda_kernel(x, block) == "generic":
        slow = "such a block"
    else:
        return None
    if _why_not_triton_asked(x) is not None:
        return None  # Better than nothing.
    return f"the kernel for {slow} has no tensor cores; backend='cuda' runs it anyway"


def _why_not_cuda_asked(x: Tensor | None, block: Block | None = None) -> str | None:
    if cuda_missing is not None:
        return cuda_missing
    if x is None:
        return None
    if not x.is_cuda:
        return f"x must be on a GPU, got {x.device}"
    reason = _why_not_gpu(x.device) or _why_no_code(x.device) or _why_not_dtype(x)
    return reason or _why_not_block(block)


def _why_not_triton(x: Tensor | None, block: Block | None = None) -> str | None:
    if x is not None and x.device.type == "cpu":
        return (
            "x must be on a GPU, got cpu; there Triton's slow interpreter runs the kernel if"
            " backend='triton' asks for it"
        )
    reason = _why_not_triton_asked(x, block)
    if reason is None and x is not None and x.dtype == torch.float32 and not _tf32_allowed():
        return (
            "x is float32, for which the kernel has no tensor cores until"
            " torch.backends.cuda.matmul.fp32_precision is 'tf32'; backend='triton' runs it anyway"
        )
    return reason


def _why_not_triton_asked(x: Tensor | None, block: Block | None = None) -> str | None:
    if (reason := _why_no_triton()) is not None:
        return reason
    if x is None:
        return None
    if x.device.type not in ("cpu", "cuda"):
        return f"x must be on a GPU, or on the CPU for Triton's interpreter, got {x.device}"
    if x.is_cuda and (reason := _why_not_gpu(x.device)) is not None:
        return reason
    return _why_not_dtype(x) or _why_not_window(block)


def _why_not_block(block: Block | None) -> str | None:
    """Why the CUDA kernels do not run a block; they are for those of MobileNetV2."""
    if block is None:
        return None
    if (reason := _why_not_window(block)) is not None:
        return reason
    clips = (block.clip_expand, block.clip_dw, block.clip_project)
    names = [clip for clip in clips if isinstance(clip, str)]
    if block.gate:
        names.append("squeeze-excite")
    return f"there is no kernel for {names[-1]} yet" if names else None


def _why_not_window(block: Block | None) -> str | None:
    """Why no kernel for GPUs runs a block with such a convolution between its 1x1 ones."""
    if block is None:
        return None
    name = None
    if block.kernel_size > 5:
        name = f"kernel size {block.kernel_size}"
    elif block.dilation > 2:
        name = f"dilation {block.dilation}"
    elif block.dense:
        name = "a dense convolution"
    return name and f"there is no kernel for {name} yet"


def _why_not_dtype(x: Tensor) -> str | None:
    if type(x) is not Tensor and _is_distributed(type(x)):
        return "x must be a tensor of one process, got a DTensor, which PyTorch cannot split for us"
    if x.dtype in _DTYPES:
        return None
    return f"x must be float32, float16 or bfloat16, got {x.dtype}"


def cuda_kernel(x: Tensor, block: Block) -> str | None:
    """Name of the CUDA kernel that runs the block on x (N, C_in, H, W), whatever N and device.

    None without the compiled extension, where x has not four dimensions and where no kernel runs
    such a block.
    """
    if _C is None or x.dim() != 4 or _why_not_block(block) is not None:
        return None
    # Sizes may be symbols for the compiler, which asks about a common one.
    height, width = (56, 56) if torch.compiler.is_compiling() else x.shape[2:]
    return _cuda_kernel(block, height, width, x.dtype)


def asked_once_a_graph(question: _Question) -> _Question:
    """The compiler cannot trace such questions; it takes the answer of the moment it compiles.

    As `torch.compiler.assume_constant_result`, which imports the compiler: that takes a second.
    """
    vars(question)["_dynamo_marked_constant"] = True
    return question


@asked_once_a_graph
def _why_no_triton() -> str | None:
    return triton.missing()


@asked_once_a_graph
def _tf32_allowed() -> bool:
    return triton.precision(torch.float32) == "tf32"


@asked_once_a_graph
def _why_not_gpu(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "x must be on an NVIDIA GPU, got one of AMD"
    # Traced without a GPU, for another machine.
    if not torch.cuda.is_available():
        return None
    major, minor = _capability(device)
    if major < 8:
        return f"x must be on a GPU of compute capability 8.0 or later, got {major}.{minor}"
    return None


@asked_once_a_graph
def _why_no_code(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if _C.cuda_runs_on(index):
        return None
    major, minor = _capability(device)
    return (
        f"the CUDA kernels were built without code for compute capability {major}.{minor};"
        f" TORCH_CUDA_ARCH_LIST={major}.{minor} at installation adds it"
    )


@asked_once_a_graph
def _is_distributed(kind: type[Tensor]) -> bool:
    # Without it imported, which takes a second, there is none.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and issubclass(kind, distributed.DTensor)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@asked_once_a_graph
def _cuda_kernel(block: Block, height: int, width: int, dtype: torch.dtype) -> str:
    return _known_cuda_kernel(block, height, width, dtype)


@lru_cache(4096)
def _known_cuda_kernel(block: Block, height: int, width: int, dtype: torch.dtype) -> str:
    return _C.cuda_kernel(*block[:-2], height, width, str(dtype).removeprefix("torch."))


BACKENDS = (
    Backend("cpu", _why_not_cpu),
    Backend("cuda", _why_not_cuda, _why_not_cuda_asked),
    Backend("triton", _why_not_triton, _why_not_triton_asked),
    Backend("reference", lambda x, block=None: None),
)


def check_backend(owner: str, name: object) -> None:
    """ValueError, in the name of a function or class, where its `backend` is no backend's name."""
    names = [b.name for b in BACKENDS]
    if name is not None and name not in names:
        raise ValueError(f"{owner}: backend must be one of {', '.join(names)}, got {name!r}")


def choose(name: str | None, x: Tensor, block: Block | None = None) -> str:
    """The name of the backend that will run the block on x; raises where the asked-for one cannot.

    Only the choice among kernels for GPUs looks at the block.
    """
    if name is None:
        return next(b.name for b in BACKENDS if b.why_not(x, block) is None)
    check_backend("inverted_residual", name)
    backend = next(b for b in BACKENDS if b.name == name)
    reason = backend.why_refused(x, block)
    if reason is not None:
        raise RuntimeError(f"inverted_residual: backend {name!r} cannot run here: {reason}")
    return name


def takes_triton(x: Tensor) -> bool:
    """Whether layers outside of blocks run on x in Triton's kernels by themselves.

    The compiler makes such kernels of its own.
    """
    return not torch.compiler.is_compiling() and _why_not_triton(x) is None


def is_for_layers(name: str | None, x: Tensor) -> bool:
    """Whether `choose` can only say "reference", unasked and whatever the block.

    To be asked before anything else is: float64 layers take so long that nobody would fuse them
    for speed, and they should not take longer for having been fused.
    """
    return name is None and not (x.dtype in _DTYPES and x.device.type in _DEVICES)


def why_no_kernel(x: Tensor, block: Block | None = None) -> str | None:
    """None where a backend other than the reference can run on x, otherwise why those for x's
    device cannot.
    """
    reasons = {b.name: b.why_not(x, block) for b in BACKENDS if b.name != "reference"}
    if not all(reasons.values()):
        return None
    names = ("cpu",) if x.device.type == "cpu" else ("cuda", "triton")
    return "; ".join(reasons[name] for name in names)


_said_layers_run = False


def warn_if_layers_run(device: torch.device, *, may_move: bool) -> None:
    """Say, once in a process, that models on a device run layer by layer for want of the extension.

    Not for a model that may still move to a GPU which has a kernel.
    """
    global _said_layers_run
    if missing is None or _said_layers_run:
        return
    devices = {device.type, *(("cuda",) if may_move and torch.cuda.is_available() else ())}
    if all(why_no_kernel(torch.empty(0, dtype=torch.half, device=d)) for d in devices):
        _said_layers_run = True
        said = f"no kernel runs here, so that models run layer by layer: {missing}"
        # Of the line that called the public function.
        warnings.warn(said, stacklevel=3)


_ran: Counter[str] = Counter()


def count(name: str) -> None:
    """One call more of the backend, or of "network", layers that ran as one call."""
    _ran[name] += 1


def ran() -> Counter[str]:
    """How often each backend has run a block in this process, and "network" several layers as one
    call: for tests and diagnosis. Compiled programs are not counted.
    """
    return _ran.copy()


def backends() -> dict[str, str]:
    """Every backend by name, with what it runs on here or the reason why it cannot.

    Example:
        >>> mk.backends()["reference"]
        'plain PyTorch, any device and floating dtype'
    """
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
        return f"float16, bfloat16 and float32, Triton {triton.version()} ({where})"
    if name == "cuda":
        where = "NVIDIA GPUs" if torch.cuda.is_available() else "no GPU here"
        return f"float16, bfloat16 and float32, CUDA {_C.build_info()['cuda']} ({where})"
    kernels = _C.cpu_kernels()
    used = next(k for k in kernels if k["selected"])
    pairs = ", bfloat16 numbers two at a time" if used["pairs"] else ""
    built = ", ".join(k["name"] for k in kernels)
    return f"float32, bfloat16 and float16, {used['name']}{pairs} (built for: {built})"


def load(library: torch.library.Library, triton_op: Callable[..., Tensor]) -> None:
    """Give the op a kernel on the devices for which there is no compiled one.

    Importing the extension has registered its kernels with the dispatcher already.
    """
    if missing is not None:

        def unavailable(*args: object) -> NoReturn:
            raise RuntimeError(f"inverted_residual: {missing}")

        library.impl("inverted_residual", unavailable, "CPU")
    if cuda_missing is not None:
        library.impl("inverted_residual", lambda *args: triton_op(*args), "CUDA")
