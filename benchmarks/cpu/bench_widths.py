"""MobileNetV2 of every width and resolution of the paper (section 6.1.1) and wider, as plans.

No size is a special case: each is to reach 90 % of the share of the multiply-add peak that the
network has at 1.0 and 224x224, with the same dtype and batch. All take turns in one process, so
that each is compared with that one in the same rounds; small networks find the weights of the
others in the caches when their turn begins, and its first calls do not count.
"""

import statistics
from collections.abc import Sequence
from time import perf_counter

import pytest
import torch

from mnv2_kernels import plan
from mnv2_kernels.block import cost
from mnv2_kernels.profiling.timing import fma_peak, num_threads

from .. import harness
from ..machine import facts
from ..peers.check import bfloat16_rounding, error_of
from ..peers.lost_time import LostTime
from ..peers.turns import take_turns

Size = tuple[float, int]  # (width, rows and columns of the image)

PROVIDERS = {torch.float32: "planned", torch.bfloat16: "planned-bf16"}
PEAK = "multiply-add peak"
PEAK_SECONDS = 0.05
WARMUP = 2


@pytest.mark.parametrize("batch", (1, 8))
@pytest.mark.parametrize("dtype", PROVIDERS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_widths(benchmark, record, request, dtype, batch):
    tolerance = request.config.getoption("--tolerance")
    rounds = {1: 11, 8: 7}[batch]
    rows = benchmark.pedantic(
        measure,
        (harness.SIZES,),
        {"dtype": dtype, "batch": batch, "rounds": rounds, "tolerance": tolerance},
        rounds=1,
    )
    record(rows)


@torch.inference_mode()
def measure(
    sizes: Sequence[Size],
    *,
    dtype: torch.dtype,
    batch: int,
    rounds: int,
    tolerance: float,
    seconds: float = 0.03,
    reference: Size = harness.REFERENCE_SIZE,
    threads: int = 1,
) -> list[harness.Row]:
    """Check a plan of every size, time them in turns: rows of suite `widths`.

    Args:
        sizes: reference among them.
        rounds, seconds: turns of each that count; how long a turn is, three calls at least.
        tolerance: share of a turn that may be lost to other processes and machines.

    Raises:
        AssertionError: a result is wrong, or every turn of a size was lost.
    """
    precision = str(dtype).removeprefix("torch.")
    models = {width: harness.network_of_width(width) for width, _ in sizes}
    calls, errors = {}, {}
    with num_threads(threads):
        for width, resolution in sizes:
            x = harness.image(3, resolution, batch)
            planned = plan(models[width], (3, resolution, resolution), dtype=dtype)
            given = x.to(dtype)
            calls[width, resolution] = lambda planned=planned, given=given: planned(given)
            # The image that comes last, in whatever order they are computed.
            last = x[-1:]
            expected = harness.truth(models[width], last)
            rounding = None
            if dtype == torch.bfloat16:
                rounding = bfloat16_rounding(models[width], last, expected)
            errors[width, resolution] = error_of(
                planned(given)[-1:].float(), expected, precision, rounding
            )
        turns = {PEAK: lambda: _peak_turn(threads)}
        turns |= {size: (lambda call=call: _turn(call, seconds)) for size, call in calls.items()}
        samples = take_turns(turns, rounds=rounds, tolerance=tolerance, pause=lambda: None)
    bound = max(samples.pop(PEAK).clean, default=0.0) or None
    lost = [size for size, found in samples.items() if not found.clean]
    if lost:
        raise AssertionError(
            f"at most {tolerance:.0%} of a turn may be lost, and more was in all turns of {lost}"
        )
    flops = {size: 2 * cost.network_multiply_adds(*size, batch=batch) for size in sizes}
    rows = []
    for size, found in samples.items():
        times = found.quartiles()
        rate = flops[size] / times["50%"] / 1e9
        ratio = found.ratio(samples[reference])
        work = flops[size] / flops[reference]
        rows.append(
            {
                "suite": "widths",
                "model": "mnv2_kernels mobilenet_v2",
                "width": size[0],
                "resolution": size[1],
                "provider": PROVIDERS[dtype],
                "batch": batch,
                "dtype": precision,
                "threads": threads,
                "seconds": times,
                "rounds": len(found.clean),
                "dropped": found.dropped,
                "gflops": rate,
                "fma_peak_gflops": bound,
                "share_of_fma_peak": rate / bound if bound else None,
                "share_over_reference": None if ratio is None else work * ratio,
                "error": errors[size],
                **facts(),
            }
        )
    return rows


def _turn(call: harness.Call, seconds: float) -> tuple[float, float]:
    """(seconds of a call, share of the time that was lost)."""
    for _ in range(WARMUP):
        call()
    samples = []
    lost = LostTime()
    begin = now = perf_counter()
    while len(samples) < 3 or now - begin < seconds:
        before = now
        call()
        now = perf_counter()
        samples.append(now - before)
    return statistics.median(samples), lost.share()


def _peak_turn(threads: int) -> tuple[float, float]:
    lost = LostTime()
    return fma_peak(threads, seconds=PEAK_SECONDS) or 0.0, lost.share()
