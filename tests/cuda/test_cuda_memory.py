"""The CUDA kernels on the emulator under AddressSanitizer and UndefinedBehaviorSanitizer.

The sanitizers need a process that loads them first: `python test_cuda_memory.py KERNEL [CHANGE]`
runs a kernel's calls on tensors that have exactly their bytes, each in memory of its own.
"""

import ctypes
import os
import subprocess
import sys
from dataclasses import replace

import cpu_driver
import pytest
import torch
from cases import LONG, expect, why_wrong
from cuda_cases import DTYPES, KERNEL_DTYPES, groups, make_inputs, needs_emulator
from emulated_cuda import H200, KERNELS, ROOT, SCHEDULES, Library
from torch import Tensor

pytestmark = [pytest.mark.sampled(2), needs_emulator]
FLAGS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
LIBC.malloc.argtypes = [ctypes.c_size_t]
LIBC.free.argtypes = [ctypes.c_void_p]

# Texts of the generic kernel and what replaces them.
CHANGES = {
    "a missing barrier": ("block_barrier();\n            convolve", "convolve"),
    "a bound one too far": ("channel >= end_channel", "channel > end_channel"),
}


class Exact:
    """The bytes of a tensor in memory of their own, around which the sanitizer sees everything."""

    def __init__(self, values: Tensor):
        self.bytes = values.numel() * values.element_size()
        self.address = LIBC.malloc(self.bytes)
        ctypes.memmove(self.address, values.data_ptr(), self.bytes)

    @property
    def inside(self) -> Tensor:
        copy = torch.empty(self.bytes, dtype=torch.uint8)
        ctypes.memmove(copy.data_ptr(), self.address, self.bytes)
        return copy

    def changed_outside(self) -> bool:
        return False

    def __del__(self):
        LIBC.free(self.address)


def run_calls(kernel: str, change: str | None = None) -> None:
    """Some of the cases of every group, dtypes and schedules in turn."""
    path = ROOT / f"csrc/cuda/{kernel}/{kernel}.cu"
    text = path.read_text()
    if change is not None:
        old, new = CHANGES[change]
        assert text.count(old) == 1, f"{text.count(old)} times in the source: {old}"
        text = text.replace(old, new)
    library = Library(kernel, FLAGS, {path: text})
    dtypes = [DTYPES[name] for own, name in KERNEL_DTYPES if own == kernel]
    count = 0
    for group in groups().values():
        for i, case in enumerate(group[:: max(1, len(group) // (12 if LONG else 4))]):
            x, weights = make_inputs(case, dtypes[i % len(dtypes)])
            if not library.takes(x, weights, **case.settings):
                continue
            device = replace(H200, multiprocessors=(1, 132)[i % 2])
            options = {"schedule": SCHEDULES[i % 3], "device": device, "place": Exact}
            y = library.run(x, weights, **case.settings, **options)
            assert (reason := why_wrong(y, expect(case, x, weights))) is None, reason
            count += 1
    print(f"{count} calls")


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess:
    libraries = [cpu_driver.library(name) for name in ("libasan.so", "libubsan.so")]
    if not all(libraries):
        pytest.skip("g++ has no sanitizers")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_outside_the_tensors_is_touched(kernel):
    done = run_sanitized(kernel)
    assert done.returncode == 0, done.stderr[-3000:]
    calls = int(done.stdout.split()[0])
    least = {"patch": 4, "tile": 25, "generic": 40}[kernel]
    assert calls >= (3 * least if LONG else least)


@pytest.mark.parametrize("change", CHANGES)
def test_seeded_faults_are_found(change):
    done = run_sanitized("generic", change)
    words = {
        "a missing barrier": ("race", "nobody has written"),
        "a bound one too far": ("AddressSanitizer",),
    }
    assert done.returncode != 0
    assert any(word in done.stderr for word in words[change]), done.stderr[-3000:]


if __name__ == "__main__":
    run_calls(*sys.argv[1:])
