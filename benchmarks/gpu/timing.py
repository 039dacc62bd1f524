"""Timing on a GPU: calls in turns by CUDA events, graphs of calls, sets of inputs beyond L2."""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from time import perf_counter

import torch
from torch import Tensor

Call = Callable[[], object]


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    device: torch.device,
    seconds: float = 2e-3,
    warmup: int = 3,
) -> dict[str, list[float]]:
    """Seconds per call, `rounds` samples a name, taken in turns: A B C A B C ...

    A sample is as many consecutive calls as fill `seconds`, between two CUDA events, or by
    the clock on the CPU. Sample i of every name is of the same round, so that ratios may be taken
    pair by pair.

    Raises:
        ValueError: rounds is below 1.
    """
    if rounds < 1:
        raise ValueError(f"interleave: rounds must be at least 1, got {rounds}")
    repeats = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        repeats[name] = max(1, math.ceil(seconds / max(_sample(call, 1, device), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(_sample(call, repeats[name], device))
    finally:
        if was_enabled:
            gc.enable()
    return samples


def _sample(call: Call, repeats: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = perf_counter()
        for _ in range(repeats):
            call()
        return (perf_counter() - start) / repeats
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def input_sets(nbytes: int, l2_bytes: int, *, most: int = 64) -> int:
    """How many sets of inputs and results of `nbytes` to take in turns.

    As many as make three times L2, so that none is left of it when its turn comes again; `most` of
    them where that would be more.
    """
    return max(1, min(most, math.ceil(3 * l2_bytes / max(nbytes, 1))))


def in_turns(call: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> Call:
    """A call without arguments that takes the next input every time."""
    turns = cycle(inputs)
    return lambda: call(next(turns))


class Graph:
    """A CUDA graph of one call for each input, one after another.

    `replay()` runs all of them; `outputs` are their results, each in memory of its own, rewritten
    by every replay.

    Raises:
        RuntimeError: something in the call cannot be captured.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for x in (*inputs[:2], *inputs[:2]):
                call(x)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [call(x) for x in inputs]

    def replay(self) -> None:
        self.graph.replay()


def poison(y: Tensor, blocks: int = 8) -> None:
    """Leave NaN in memory that the allocator hands out next for results of y's size.

    An element that a kernel forgets to write is then seen, not the right value of an earlier call.
    """
    held = [torch.full_like(y, math.nan) for _ in range(blocks)]
    del held
