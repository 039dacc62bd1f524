"""The NEON kernel against float64: cross-compiled and emulated where there is no Arm machine.

cpu_alone/driver.cpp runs the kernels of csrc/cpu without torch, in memory between pages that cannot
be touched. Needs `apt-get install g++-aarch64-linux-gnu qemu-user`, or an aarch64 machine with g++.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build/cpu_alone"
KERNELS = [ROOT / "csrc/cpu" / f"{n}.cpp" for n in ("neon", "kernels", "network", "schedule")]
DRIVER = ROOT / "tests/cpu_alone/driver.cpp"
ON_ARM = platform.machine() in ("aarch64", "arm64")
COMPILER = "g++" if ON_ARM else "aarch64-linux-gnu-g++"
EMULATOR = [] if ON_ARM else ["qemu-aarch64"]
MISSING = [tool for tool in (COMPILER, *EMULATOR) if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
    pytest.mark.timeout(600),
]


def compiled() -> Path:
    """The driver, compiled once for each state of its sources."""
    command = [COMPILER, "-std=c++20", "-O3", "-Wall", "-Werror", "-static"]
    headers = (p for folder in (ROOT / "csrc", DRIVER.parent) for p in sorted(folder.rglob("*.*")))
    digest = hashlib.sha256(" ".join(command).encode())
    for path in headers:
        digest.update(path.read_bytes())
    made = CACHE / f"driver-{digest.hexdigest()[:20]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            part = made.with_suffix(".part")
            subprocess.run([*command, DRIVER, *KERNELS, "-o", part], check=True)
            os.replace(part, made)
    return made


def run(what: str, folder: Path) -> subprocess.CompletedProcess:
    """In a folder of its own, where the emulator leaves its core."""
    command = [*EMULATOR, compiled(), what]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def counts(done: subprocess.CompletedProcess) -> dict[str, int]:
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} in {lines[-3:]}\n{done.stderr}"
    assert lines[-1].startswith("neon: ")
    return {name: int(count) for name, count in re.findall(r"(\S+) (\d+)", lines[-1])}


def test_blocks(tmp_path):
    found = counts(run("blocks", tmp_path))
    assert found["calls"] >= 1500 and found["low"] >= 1000 and found["high"] >= 1000
    assert found["chunks"] >= 100 and found["groups"] >= 2 and found["strips"] >= 2


def test_networks(tmp_path):
    found = counts(run("networks", tmp_path))
    assert found["calls"] == 60 and found["streams"] >= 50 and found["in-place"] >= 20


def test_the_pages_around_memory_catch(tmp_path):
    done = run("overrun", tmp_path)
    assert done.stdout == "one number more\n" and done.returncode == -signal.SIGSEGV
