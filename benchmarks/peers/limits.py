"""Runtimes held back to an instruction set below the CPU's best, and whether they keep to it.

They are asked by their own switches, which are variables of the environment; some have none
(LiteRT, ExecuTorch, ONNX Runtime, ncnn) and take what the CPU has. So nobody is believed: Linux
notes of every thread when it last had AVX-512 registers in use (`/proc/PID/arch_status`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from .. import machine

TASKS = Path("/proc/self/task")
# Of torch and this package; of oneDNN, torch's and OpenVINO's; of torch's matrix products; of what
# torch compiles; and of the C library, whose copies would count as a use.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "TORCHINDUCTOR_CPP_MARCH": "haswell",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512BW,-AVX512VL",
}
LIMITS = {"avx2": AVX2}
# Registers are noted when a thread is put to sleep, by a clock that ticks every 10 ms at most.
SLEEP = 0.05
TICK = 0.01


@contextmanager
def limited(isa: str | None) -> Iterator[None]:
    """Processes started inside are asked to keep to `isa`, a key of LIMITS; None asks nothing."""
    asked = {} if isa is None else LIMITS[isa]
    # torch reads its variable once: this process is not to be held back with the others.
    machine.instruction_set()
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Avx512Watch:
    """Looks at the threads of this process from when it is made."""

    def __init__(self, tasks: Path = TASKS):
        self._tasks = tasks
        self._begin = monotonic()

    def used(self) -> bool | None:
        """Whether AVX-512 registers have been in use since; None where the system does not say."""
        sleep(SLEEP)
        since = 1000 * (monotonic() - self._begin + TICK)
        texts = []
        for path in self._tasks.glob("*/arch_status"):
            try:
                texts.append(path.read_text())
            except OSError:
                # The thread has ended meanwhile.
                continue
        if not texts:
            return None
        # Without a line the CPU has none; -1 is never.
        ages = [int(text.partition("AVX512_elapsed_ms:")[2] or -1) for text in texts]
        return any(0 <= age <= since for age in ages)
