"""What a row of results must say about the machine and the software that it came from."""

import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

from mnv2_kernels.profiling import timing

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("mnv2_kernels", "csrc", "setup.py")


@cache
def facts() -> dict[str, object]:
    """Machine, instruction set, versions, commit and time of the first call in this process."""
    build = {} if timing._C is None else timing._C.build_info()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        **cache_sizes(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": build.get("compiler"),
        "source_hash": build.get("source_hash"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def instruction_set() -> str:
    """The instruction set of the kernels that run here: avx512, avx2 or default."""
    return torch.backends.cpu.get_cpu_capability().lower()


def cpu_model() -> str:
    """Model name, with the family and model numbers that tell virtual machines apart."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    fields = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    if "cpu family" not in fields:
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"


def cache_sizes() -> dict[str, str | None]:
    """Sizes of L1d and L2 (of a core) and of L3, as the system writes them: `32K`."""
    sizes = dict.fromkeys(("l1d", "l2", "l3"))
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind = ((index / name).read_text().strip() for name in ("level", "type"))
        key = "l1d" if (level, kind) == ("1", "Data") else f"l{level}"
        if key in sizes and kind != "Instruction":
            sizes[key] = (index / "size").read_text().strip()
    return sizes


def commit() -> str:
    """The checked-out commit, with a + where sources differ from it; a hash of the sources outside
    a repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return f"sources {_hash()}"
    return head + ("+" if changed else "")


def _hash() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        for path in sorted([ROOT / name, *(ROOT / name).rglob("*")]):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
