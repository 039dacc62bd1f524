"""The CUDA kernels on the CPU: built by the host compiler against tests/cuda_on_cpu, and run.

    y = emulated_cuda.run("patch", x, weights, stride=1, padding=(1, 1, 1, 1), dilation=1,
                          residual=True)

What a kernel does wrong on the way (a race, an address, a deadlock) is an `EmulatorError`.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import Padding
from mnv2_kernels.ops import contract

ROOT = Path(__file__).parents[2]
KERNELS = ("patch", "tile", "generic")
SCHEDULES = ("round_robin", "random_fiber", "greedy_warp")
FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-mf16c", "-fPIC", "-fno-strict-aliasing", "-x", "c++"),
    *(
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-attributes",
        "-Wno-unused-function",
        "-fmax-errors=10",
    ),
)
CACHE = ROOT / "build/cuda_on_cpu"
# A shared address that nobody wrote, and what a kernel leaves unwritten of y: a NaN in every dtype,
# other than those that arithmetic gives.
FILL = 0xFF
_ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class EmulatorError(Exception):
    """What a kernel did wrong while it ran."""


@dataclass(frozen=True)
class Device:
    """What a launch is told of the GPU (csrc/cuda/call.h)."""

    multiprocessors: int
    shared_bytes: int
    capability: int
    cluster: int


H200 = Device(132, 227 << 10, 90, 8)
A100 = Device(108, 163 << 10, 80, 1)


@dataclass(frozen=True)
class Counts:
    """Of one run: blocks of threads, barriers that they passed, 8x8 matrices that ldmatrix read
    and the passes over the banks that this took."""

    blocks: int
    block_barriers: int
    matrices: int
    passes: int


def cuda_include() -> Path | None:
    """The folder with cuda_fp16.h, without which nothing here can be built."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    for home in homes:
        if home and (Path(home) / "include/cuda_fp16.h").exists():
            return Path(home) / "include"
    return None


def why_not() -> str | None:
    """Why nothing can be emulated here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the emulator needs Linux on x86-64"
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    if cuda_include() is None:
        return "the emulator needs CUDA's headers (CUDA_HOME)"
    return None


LIBRARY = ROOT / "tests/cuda_on_cpu/library.cpp"
EMULATOR = tuple(
    ROOT / "tests/cuda_on_cpu" / name for name in ("emulator.cpp", "memory.cpp", "control.cpp")
)


def build(
    sources: Sequence[Path], flags: Sequence[str] = (), texts: Mapping[Path, str] | None = None
) -> Path:
    """Compile and link; returns the library. What was built from the same text is taken again.

    texts: what to compile instead of the text of some sources.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    flags, texts = [*FLAGS, *flags], texts or {}

    def compile_one(path: Path) -> Path:
        return _compile(path, texts.get(path) or path.read_text(), flags)

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    key = hashlib.sha256(" ".join(objects).encode()).hexdigest()[:20]
    library = CACHE / f"{key}.so"
    sanitize = [flag for flag in flags if flag.startswith("-fsanitize")]
    _make(library, lambda to: ["g++", "-shared", *sanitize, *objects, "-o", to])
    return library


@cache
def _headers() -> bytes:
    """Hash of every header that a source can include."""
    digest = hashlib.sha256()
    for folder in ("csrc", "tests/cuda_on_cpu"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".h", ".cuh"):
                digest.update(path.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()


def _compile(path: Path, text: str, flags: list[str]) -> Path:
    digest = hashlib.sha256(_headers() + "\0".join([str(path), text, *flags]).encode())
    name = digest.hexdigest()[:20]
    include = [ROOT / "tests/cuda_on_cpu", path.parent, cuda_include()]
    command = ["g++", *flags, *(f"-I{folder}" for folder in include), "-c"]
    # The text is compiled from the standard input, so that a mutant needs no file of its own.
    object_file = CACHE / f"{name}.o"
    _make(object_file, lambda to: [*command, "-", "-o", to], text=f'#line 1 "{path}"\n{text}')
    return object_file


def _make(path: Path, command, text: str | None = None) -> None:
    """Runs a command that writes `path`, in one process at a time and unless it is there."""
    with open(CACHE / f"{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        temporary = f"{path}.new"
        done = subprocess.run(command(temporary), input=text, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path.name} was not built:\n{done.stderr}")
        os.replace(temporary, path)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "H", "W", "H_out", "W_out")),
        *((name, ctypes.c_int64) for name in ("in_channels", "hidden_channels", "out_channels")),
        *((name, ctypes.c_int64) for name in ("kernel", "stride", "dilation")),
        *((name, ctypes.c_int64) for name in ("pad_top", "pad_left", "expansion", "residual")),
        ("element", ctypes.c_int64),
        ("clips", ctypes.c_float * 6),
        *((name, ctypes.c_void_p) for name in ("x", "w_expand", "w_dw", "w_project")),
        *((name, ctypes.c_void_p) for name in ("b_expand", "b_dw", "b_project", "y")),
    ]


class Guarded:
    """The elements of a tensor in memory of their own, between others that are NaN."""

    _MARGIN = 4096

    def __init__(self, values: Tensor):
        """values: contiguous; the copy starts at a multiple of 16 bytes, and no larger one."""
        self.bytes = values.numel() * values.element_size()
        self.memory = torch.full((2 * self._MARGIN + self.bytes,), FILL, dtype=torch.uint8)
        self.start = self._MARGIN - self.memory.data_ptr() % 32 + 16
        self.address = self.memory.data_ptr() + self.start
        self.inside = self.memory[self.start : self.start + self.bytes]
        self.inside.copy_(values.reshape(-1).view(torch.uint8))

    def changed_outside(self) -> bool:
        before, after = self.memory[: self.start], self.memory[self.start + self.bytes :]
        return not bool((before == FILL).all() and (after == FILL).all())


class Emulator:
    """A built library with tests/cuda_on_cpu in it. `counts` are of the last launch."""

    def __init__(self, path: Path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.mnv2_message.restype = ctypes.c_char_p
        self.counts: Counts | None = None

    def launch(
        self,
        name: str,
        start: Callable[[], int],
        device: Device = H200,
        schedule: str = "round_robin",
        seed: int = 1,
        tracking: bool = True,
    ) -> None:
        """Calls `start`, which launches a kernel and returns a cudaError_t.

        Raises EmulatorError with the first thing that the kernel did wrong, RuntimeError where the
        launch was refused. tracking: see races, and reads of what nobody wrote.
        """
        self.functions.mnv2_configure(
            SCHEDULES.index(schedule), seed, tracking, device.shared_bytes, device.cluster
        )
        status = start()
        if message := self.functions.mnv2_message().decode():
            raise EmulatorError(f"{name}: {message}")
        if status:
            raise RuntimeError(f"{name}: the launch was refused with CUDA error {status}")
        counts = (ctypes.c_int64 * 4)()
        self.functions.mnv2_counts(counts)
        self.counts = Counts(*counts)


class Library(Emulator):
    """A library with one of the kernels."""

    def __init__(
        self, kernel: str, flags: Sequence[str] = (), texts: Mapping[Path, str] | None = None
    ):
        """flags, texts: of `build`."""
        source = ROOT / f"csrc/cuda/{kernel}/{kernel}.cu"
        plans = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
        flags = [*flags, f"-DMNV2_RUN=run_{kernel}"]
        super().__init__(build([source, *plans, *EMULATOR, LIBRARY], flags, texts))
        self.kernel = kernel

    def takes(self, x: Tensor, weights: FoldedWeights, **settings) -> bool:
        """Whether the kernel can run a call."""
        call = _describe(x, weights, **settings)
        return bool(self.functions.mnv2_takes(KERNELS.index(self.kernel), ctypes.byref(call)))

    def run(
        self,
        x: Tensor,
        weights: FoldedWeights,
        *,
        device: Device = H200,
        schedule: str = "round_robin",
        seed: int = 1,
        tracking: bool = True,
        place: type = Guarded,
        image: tuple[int, int] | None = None,
        **settings,
    ) -> Tensor:
        """One call of the kernel.

        settings: stride, padding, dilation, residual; the others are as in `launch`.
        place: puts tensors where the kernel finds them. image: height and width that the kernel is
        told x has.

        x (N, C_in, H, W), float16, bfloat16 or float32; weights in the same dtype, their biases in
        any. Returns y (N, C_out, H_out, W_out), channels_last. Raises as `launch` does, and
        ValueError where the kernel does not take the call.
        """
        kernel = self.kernel
        if not self.takes(x, weights, **settings):
            raise ValueError(f"{kernel} does not take this call")
        call = _describe(x, weights, **settings)
        call.H, call.W = image or (call.H, call.W)
        memory = {
            name: place((t.float() if name.startswith("b_") else t).contiguous())
            for name in ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")
            if (t := getattr(weights, name)) is not None
        }
        memory["x"] = place(x.permute(0, 2, 3, 1).contiguous())
        y = torch.empty(call.N, call.H_out, call.W_out, call.out_channels, dtype=x.dtype)
        y.view(torch.uint8).fill_(FILL)
        memory["y"] = place(y)
        for name, placed in memory.items():
            setattr(call, name, placed.address)
        arguments = ctypes.byref(call), *astuple(device)
        self.launch(
            kernel,
            lambda: self.functions.mnv2_run(*arguments),
            device,
            schedule,
            seed,
            tracking,
        )
        if memory["y"].changed_outside():
            raise EmulatorError(f"{kernel}: wrote outside of y")
        y.view(-1).view(torch.uint8).copy_(memory["y"].inside)
        fill = {2: torch.int16, 4: torch.int32}[y.element_size()]
        if bool((left := y.view(fill) == -1).any()):
            raise EmulatorError(
                f"{kernel}: never wrote y at (image, row, column, channel)"
                f" {left.nonzero()[0].tolist()}"
            )
        return y.permute(0, 3, 1, 2)


def _describe(
    x: Tensor,
    weights: FoldedWeights,
    *,
    stride: int,
    padding: Padding,
    dilation: int,
    residual: bool,
) -> _Call:
    """A call without its pointers."""
    shape = contract.check(
        x, *weights.tensors(), stride, padding, dilation, residual, *weights.clips()
    )
    batch, out_channels, height_out, width_out = shape
    _, in_channels, height, width = x.shape
    kernel, _, hidden = weights.w_dw.shape
    return _Call(
        *(batch, height, width, height_out, width_out, in_channels, hidden, out_channels),
        *(kernel, stride, dilation, *padding[:2], weights.w_expand is not None, residual),
        _ELEMENTS[x.dtype],
        (ctypes.c_float * 6)(*(bound for clip in weights.clips() for bound in clip)),
    )


@cache
def library(kernel: str) -> Library:
    """The library of a kernel as it is in the package."""
    return Library(kernel)


def chosen(x: Tensor, weights: FoldedWeights, **settings) -> str:
    """The kernel that the package would take for a call."""
    call = _describe(x, weights, **settings)
    return KERNELS[library("generic").functions.mnv2_choose(ctypes.byref(call))]


def run(kernel: str | None, x: Tensor, weights: FoldedWeights, **settings) -> Tensor:
    """`Library.run` of a kernel, or of the one that the package would take."""
    return library(kernel or chosen(x, weights, **settings)).run(x, weights, **settings)
