"""Measuring memory: what a call holds from PyTorch's allocator, allocation by allocation.

The resident size of a process shows pages that the system has not taken back yet; the allocator's
own events show what a call needed, to the byte, and the same on every run.
"""

import os
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile


def live_bytes(call: Callable[[], object]) -> list[int]:
    """Bytes that `call` holds after each of its allocations and releases on the CPU, in order.

    Only blocks allocated during the call count: the result does, its input, which was there
    before, does not, and releasing the input changes nothing. The result is kept until the end.
    Covers the calling thread; operators allocate there, also where they compute on several.
    """
    live: dict[int, int] = {}
    total = 0
    totals = []
    for address, size in _events(call):
        change = size
        if size > 0:
            live[address] = size
        else:
            change = -live.pop(address, 0)
        if change:
            total += change
            totals.append(total)
    return totals


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that `call` holds at any time beyond what was held before it.

    Args:
        call: run once; call it before, so that what it keeps for later calls is in place.
        device: where its tensors are. On a CUDA device PyTorch's caching allocator counts,
            which rounds every block up to 512 bytes.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return max(live_bytes(call), default=0)
    if device.type != "cuda":
        raise ValueError(f"peak_bytes: device must be a CPU or CUDA device, got {device}")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def peak_bytes_again(call: Callable[[], object]) -> int:
    """`peak_bytes` on the CPU of a second call that is profiled.

    A fused network runs block by block while a profiler records: in the first such call the blocks
    fold their weights, which they keep.
    """
    live_bytes(call)
    return peak_bytes(call)


def allocations(call: Callable[[], object]) -> list[int]:
    """Size in bytes of every block that `call` allocates on the CPU, in order."""
    return [size for _, size in _events(call) if size > 0]


def _events(call: Callable[[], object]) -> list[tuple[int, int]]:
    """(address, bytes) of every allocation, and (address, -bytes) of every release, in order."""
    # Keeps the profiler's notes about its own start and stop off stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(use_kineto=True, profile_memory=True) as profiler:
        result = call()
    del result
    found = []
    pending = list(profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.name == "[memory]":
            fields = event.extra_fields
            if fields.device.type == "cpu":
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    found.sort(key=lambda e: e[0])
    return [(address, size) for _, address, size in found]
