"""From built providers to rows: check every result, time in turns, hold against the floor."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnv2_kernels.ops.backends import ran
from mnv2_kernels.profiling.memory import peak_bytes
from mnv2_kernels.profiling.timing import quartiles, speedup
from mnv2_kernels.profiling.variants import plain

from ..harness import Row
from .part import Context
from .peers import Call, execution, sentence
from .timing import Graph, in_turns, interleave, poison

# Largest error over the largest value, in units of the dtype's spacing at 1. PyTorch's own layers
# reach 1 in a block and 4 in the network; a tap or a channel too few is above 100 in fp16.
BLOCK_TOLERANCE, NETWORK_TOLERANCE = 8, 32
# What the blocks of a provider must have run on.
BACKENDS = {
    "fused": ("cuda", "triton"),
    "fused-cuda": ("cuda",),
    "fused-triton": ("triton",),
}
# Images whose float64 tensors are in memory at once.
AT_A_TIME = 64


@dataclass(frozen=True)
class Workload:
    """What all providers of a measurement share.

    `inputs` are taken in turns; `truths` are their results in float64. `floors` gives seconds by
    execution.
    """

    labels: Row
    inputs: Sequence[Tensor]
    truths: Sequence[Tensor]
    tolerance: float
    floors: dict[str, float]
    rounds: int


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in float32 with parameters that dtype can hold."""
    return deepcopy(model).to(dtype).float()


@torch.inference_mode()
def truths(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the layers give in float64 for each x, computed on x's device by PyTorch."""
    exact = plain(model).to(device=inputs[0].device, dtype=torch.float64)
    return [torch.cat([exact(part.double()) for part in x.split(AT_A_TIME)]) for x in inputs]


def error_of(y: Tensor, truth: Tensor, tolerance: float) -> float:
    """Largest error over the largest value; raises where it is more than rounding.

    Raises:
        AssertionError: it is above `tolerance` times the dtype's spacing, or NaN.
    """
    if y.shape != truth.shape:
        raise AssertionError(f"result must be {tuple(truth.shape)}, got {tuple(y.shape)}")
    allowed = tolerance * torch.finfo(y.dtype).eps
    error = ((y.double() - truth).abs().max() / truth.abs().max()).item()
    if not error <= allowed:
        raise AssertionError(f"largest error must be at most {allowed:.1e}, got {error:.2e}")
    return error


def check(name: str, call: Call, workload: Workload) -> float:
    """The largest error over all inputs, each result written over NaN."""
    worst = 0.0
    before = ran()
    for x, truth in zip(workload.inputs, workload.truths, strict=True):
        poison(torch.empty(truth.shape, dtype=x.dtype, device=x.device))
        # A graph's result is overwritten by its next call.
        worst = max(worst, error_of(call(x).clone(), truth, workload.tolerance))
    expected = BACKENDS.get(name)
    found = set(ran() - before)
    if expected is not None and not (found and found <= set(expected)):
        names = " or ".join(expected)
        said = " and ".join(sorted(found)) or "none"
        raise AssertionError(f"the blocks must run on {names}, {said} ran")
    return worst


def replays(
    calls: dict[str, Call], workload: Workload, errors: dict[str, str]
) -> dict[str, Callable[[], None]]:
    """Each call for all inputs as one CUDA graph; what cannot be captured, or is wrong, is left
    out and its reason put in `errors`."""
    captured = {}
    for name, call in calls.items():
        try:
            graph = Graph(call, workload.inputs)
            for y in graph.outputs:
                y.fill_(float("nan"))
            graph.replay()
            for y, truth in zip(graph.outputs, workload.truths, strict=True):
                error_of(y, truth, workload.tolerance)
            captured[name] = graph.replay
        except (RuntimeError, AssertionError) as error:
            errors[name] = f"in a CUDA graph: {sentence(error)}"
    return captured


@torch.inference_mode()
def measure(
    context: Context,
    calls: dict[str, Call],
    errors: dict[str, str],
    workload: Workload,
    *,
    in_graph: bool,
    with_memory: Callable[[str], bool] = lambda name: True,
) -> list[Row]:
    """One row a provider: times, or the error that kept it from being timed.

    Args:
        calls, errors: from `peers.build`.
        in_graph: `seconds` are times of all inputs in one CUDA graph, a call each, next
            to `seconds_called`; otherwise they are of plain calls, whatever these do themselves.
        with_memory: whether a provider's calls allocate what they use, so that it can be counted.
    """
    device, x = context.device, workload.inputs[0]
    worst: dict[str, float] = {}
    for name, call in list(calls.items()):
        try:
            worst[name] = check(name, call, workload)
        except (RuntimeError, AssertionError) as error:
            errors[name] = sentence(error)
            del calls[name]
    peaks = {
        name: x.nbytes + peak_bytes(lambda call=call: call(x), device)
        for name, call in calls.items()
        if with_memory(name)
    }
    in_graph = in_graph and not context.dry_run
    timing = {"rounds": workload.rounds, "device": device}
    plain_calls = {name: in_turns(call, workload.inputs) for name, call in calls.items()}
    called = interleave(plain_calls, **timing)
    samples = called
    if in_graph:
        samples = {
            name: [seconds / len(workload.inputs) for seconds in of_all]
            for name, of_all in interleave(replays(calls, workload, errors), **timing).items()
        }
    rows = []
    for name in (*calls, *(name for name in errors if name not in calls)):
        row = {
            **workload.labels,
            "provider": name,
            "batch": x.shape[0],
            "dtype": str(x.dtype).removeprefix("torch."),
            "input_sets": len(workload.inputs),
        }
        if name in errors:
            rows.append({**row, "error": errors[name]})
            continue
        seconds = _quartiles(samples[name])
        floor = workload.floors[execution(name)]
        row |= {
            "seconds": seconds,
            "rounds": workload.rounds,
            "images_per_second": x.shape[0] / seconds["50%"],
            "floor_seconds": floor,
            "share_of_floor": floor / seconds["50%"],
            "speedup": _speedups(name, samples),
            "peak_bytes": peaks.get(name),
            "largest_error": worst[name],
        }
        if in_graph:
            row |= {
                "seconds_called": _quartiles(called[name]),
                "speedup_called": _speedups(name, called),
            }
        rows.append(row)
    return rows


def _quartiles(samples: list[float]) -> dict[str, float]:
    return dict(zip(("25%", "50%", "75%"), quartiles(samples), strict=True))


def _speedups(name: str, samples: dict[str, list[float]]) -> dict[str, float]:
    return {other: speedup(samples[name], samples[other]) for other in samples if other != name}
