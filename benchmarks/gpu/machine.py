"""What rows of a GPU say about it, and what it reaches: copies and matrix products, measured."""

import platform
import subprocess
from functools import cache
from statistics import median

import torch
import triton
from torch import Tensor

from ..machine import cpu_model, facts
from .roofline import Rates
from .timing import interleave

# fp32 lanes of a multiprocessor, and how many times their rate packed fp16 runs at, by compute
# capability (CUDA programming guide, arithmetic throughput); others are taken for 128 and 1.
LANES = {(8, 0): (64, 4), (9, 0): (128, 2)}
GIB = 2**30
COMMIT: list[str] = []


@cache
def gpu_facts() -> dict[str, object]:
    """GPU, driver, versions, commit and time; `gpu` is None on a machine without one."""
    known = facts()
    common = {
        "cpu": cpu_model(),
        "system": known["system"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": COMMIT[0] if COMMIT else known["commit"],
        "date": known["date"],
    }
    if not torch.cuda.is_available():
        return {"gpu": None, **common}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _smi("driver_version"),
        "max_clock_mhz": _smi("clocks.max.sm"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **common,
    }


def _smi(field: str) -> str | None:
    """One field of nvidia-smi's query, without its unit; None where it cannot tell."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def core_rates() -> dict[str, float] | None:
    """FLOP/s of multiply-adds on ordinary cores at the highest clock, by dtype; None if unknown.

    bfloat16 is computed in fp32, fp16 in packed pairs.
    """
    known = gpu_facts()
    clock = known.get("max_clock_mhz")
    if clock is None:
        return None
    major, minor = map(int, known["capability"].split("."))
    lanes, packed = LANES.get((major, minor), (128, 1))
    fp32 = 2 * lanes * known["multiprocessors"] * float(clock) * 1e6
    return {"float16": packed * fp32, "bfloat16": fp32, "float32": fp32}


def copy_bandwidth(device: torch.device, nbytes: int, *, rounds: int = 10) -> float:
    """Bytes a second, read and written, of copies between buffers taken in turns.

    `nbytes` a buffer: with four pairs of them, each far larger than L2.
    """
    sources = [torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device) for _ in range(4)]
    targets = [torch.empty_like(source) for source in sources]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    samples = interleave({"copy": copy}, rounds=rounds, device=device)["copy"]
    return 2 * len(sources) * nbytes / median(samples)


def product_rate(device: torch.device, dtype: torch.dtype, size: int, *, rounds: int = 10) -> float:
    """FLOP/s of square matrix products of random numbers."""
    generator = torch.Generator(device).manual_seed(0)

    def random() -> Tensor:
        return torch.randn(size, size, device=device, generator=generator).to(dtype)

    a, b = random(), random()
    samples = interleave({"product": lambda: a @ b}, rounds=rounds, device=device)["product"]
    return 2 * size**3 / median(samples)


def measure_device(*, dry_run: bool = False) -> dict[str, object]:
    """The row of suite `gpu_device`: facts, and rates as measured here and now."""
    device = torch.device("cpu" if dry_run else "cuda")
    nbytes, size, rounds = (2**16, 32, 2) if dry_run else (GIB, 8192, 10)
    products = {
        name: product_rate(device, getattr(torch, name), size, rounds=rounds)
        for name in ("float16", "bfloat16")
    }
    return {
        "suite": "gpu_device",
        "bytes_per_second": copy_bandwidth(device, nbytes, rounds=rounds),
        "product_flops_per_second": products,
        "core_flops_per_second": core_rates(),
        **gpu_facts(),
    }


def rates(row: dict[str, object], dtype: torch.dtype) -> Rates:
    """Rates of a row of `gpu_device`; ordinary cores as an H200's where the clock is unknown."""
    name = str(dtype).removeprefix("torch.")
    core = row["core_flops_per_second"] or {"float16": 134e12}
    products = row["product_flops_per_second"]
    return Rates(
        bandwidth=row["bytes_per_second"],
        tensor=products.get(name, products["bfloat16"]),
        core=core.get(name, 67e12),
    )
