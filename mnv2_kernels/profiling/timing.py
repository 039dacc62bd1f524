"""Timing: competing calls interleaved in one run, and the speed limit of the same machine.

A shared machine is faster now and slower a second later. Calls that take turns meet the same
noise, so that their ratio keeps its meaning where each of the two times does not.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch

from ..ops.extension import module as _C


def interleave(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2, repeats: int = 1
) -> dict[str, list[float]]:
    """Time several calls in turns, A B C A B C ..., with the garbage collector off.

    Args:
        calls: what to time, by name; they run in this order within every round.
        rounds: samples of each call.
        warmup: untimed calls of each before the first round.
        repeats: consecutive calls that make one sample; above 1 for calls of a few
            microseconds, and for a call to find its data in the cache as it left them.

    Returns:
        Seconds per call, `rounds` samples a name. Sample i of every name is of the same round,
        so that ratios may be taken pair by pair.

    Raises:
        ValueError: rounds or repeats is below 1, or warmup below 0.
    """
    for name, value, least in (
        ("rounds", rounds, 1),
        ("warmup", warmup, 0),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise ValueError(f"interleave: {name} must be at least {least}, got {value}")
    for call in calls.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _garbage_collector_off():
        for _ in range(rounds):
            for name, call in calls.items():
                start = perf_counter()
                for _ in range(repeats):
                    call()
                samples[name].append((perf_counter() - start) / repeats)
    return samples


def median(samples: Sequence[float]) -> float:
    """The middle sample, or the mean of the two in the middle."""
    return statistics.median(samples)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 25, 50 and 75 % quantiles, linear between samples; of one sample, three times itself."""
    if len(samples) == 1:
        return (samples[0],) * 3
    return tuple(statistics.quantiles(samples, n=4, method="inclusive"))


def speedup(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the rounds of baseline time / time: above 1 where `samples` is faster."""
    return median([b / s for s, b in zip(samples, baseline, strict=True)])


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let PyTorch's operators, and the kernels, use `count` threads; then restore the number."""
    if count < 1:
        raise ValueError(f"num_threads: count must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fma_peak(
    threads: int | None = None, kernel: str | None = None, *, seconds: float = 0.05
) -> float | None:
    """Most GFLOP/s that float32 multiply-adds in registers reach here and now (2 FLOPs each).

    Args:
        threads: how many run it at once; None is torch.get_num_threads().
        kernel: a name from `mnv2_kernels._C.cpu_kernels()`, whose instruction set is used; None
            is the kernel that calls here are given.
        seconds: how long to measure.

    Returns:
        The best of five parts of that time, since noise can only take away; None where the
        compiled extension is missing.

    Raises:
        ValueError: threads is below 1, or no such kernel can run here.
    """
    if _C is None:
        return None
    kernels = [k for k in _C.cpu_kernels() if k["available"]]
    names = [k["name"] for k in kernels]
    if kernel is None:
        kernel = next(k["name"] for k in kernels if k["selected"])
    elif kernel not in names:
        raise ValueError(f"fma_peak: kernel must be one of {', '.join(names)}, got {kernel!r}")
    if threads is None:
        threads = torch.get_num_threads()
    with num_threads(threads):
        return max(_C.fma_peak(kernel, threads, seconds / 5) for _ in range(5))


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
