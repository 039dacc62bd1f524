"""One case with every peer that can run: load, check, time in turns, rows."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .. import harness
from ..machine import facts
from .cases import Case
from .check import bfloat16_rounding, error_of
from .conversion import converted
from .limits import limited
from .peer import Peer
from .process import WorkerFailed, WorkerProcess
from .turns import Samples, take_turns

PEAK = "multiply-add peak"
PEAK_SECONDS = 0.05


@dataclass(frozen=True)
class Settings:
    """How to measure.

    rounds: turns of each that count. seconds: of a turn. tolerance: share of a turn's time that
    may be lost to other processes and machines. cache: folder of conversions and logs. isa: the
    key of `limits.LIMITS` that the peers are asked to keep to; None asks nothing.
    """

    rounds: int
    seconds: float
    tolerance: float
    cache: Path
    isa: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Rows of one case, and a sentence for every peer that has none."""

    case: Case
    rows: list[harness.Row]
    failures: dict[str, str]


def run(cases: Sequence[Case], peers: Sequence[Peer], settings: Settings) -> Iterator[Outcome]:
    """Each case in turn; workers live as long as the number of threads stays the same.

    Args:
        peers: that can run here.
    """
    cache = settings.cache
    cache.mkdir(parents=True, exist_ok=True)
    for threads in dict.fromkeys(case.threads for case in cases):
        with ExitStack() as stack:
            stack.enter_context(limited(settings.isa))
            workers = {
                name: stack.enter_context(
                    WorkerProcess(name, threads, cache / f"{name.replace(' ', '-')}.log")
                )
                for name in (PEAK, *(peer.name for peer in peers))
            }
            for case in cases:
                if case.threads == threads:
                    yield _run_case(case, peers, workers, settings)


def _run_case(case, peers, workers, settings) -> Outcome:
    loads, failures = _load(case, peers, workers, settings)
    idle = dict.fromkeys(loads, 0.0)

    def turn(name: str) -> tuple[float, float]:
        try:
            answer = workers[name].ask("turn", seconds=settings.seconds)
        except WorkerFailed as error:
            # The others go on; no turn of this one counts.
            failures[name] = str(error)
            return 0.0, inf
        idle[name] = max(idle[name], answer["idle_cpu"])
        return answer["value"], answer["lost"]

    def peak() -> tuple[float, float]:
        answer = workers[PEAK].ask("peak", threads=case.threads, seconds=PEAK_SECONDS)
        return answer["value"], answer["lost"]

    turns = {PEAK: peak, **{name: (lambda name=name: turn(name)) for name in loads}}
    samples = take_turns(turns, rounds=settings.rounds, tolerance=settings.tolerance)
    # Noise only ever lowers a peak.
    bound = max(samples.pop(PEAK).clean, default=0.0) or None
    for name, found in samples.items():
        if not found.clean:
            lost = f"more than {settings.tolerance:.0%} of its time was lost in every turn"
            failures.setdefault(name, lost)
    samples = {name: found for name, found in samples.items() if name not in failures}
    rows = []
    for peer in peers:
        if peer.name in samples:
            row = _row(case, peer, samples, bound)
            rows.append({**row, **loads[peer.name], "idle_seconds": idle[peer.name]})
    return Outcome(case, rows, failures)


def _load(case, peers, workers, settings) -> tuple[dict[str, harness.Row], dict[str, str]]:
    """(what rows say of it, by peer; sentence by peer that fails or is wrong)."""
    model, x = case.model(), case.input()
    expected = harness.truth(model, x)
    rounding = None
    if any(peer.precision == "bfloat16" for peer in peers):
        rounding = bfloat16_rounding(model, x, expected)
    loads, failures = {}, {}
    with TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.pt"
        for peer in peers:
            result.unlink(missing_ok=True)
            try:
                folder = converted(peer, case, model, settings.cache, settings.isa)
                workers[peer.name].revive()
                answer = workers[peer.name].ask(
                    "load",
                    peer=peer.name,
                    case=str(case),
                    folder=None if folder is None else str(folder),
                    result=str(result),
                )
                y = torch.load(result, weights_only=True)
                loads[peer.name] = {
                    "error": error_of(y, expected, peer.precision, rounding),
                    "instruction_set": answer["instruction_set"],
                }
                if settings.isa is not None and answer["used_avx512"] is not None:
                    loads[peer.name]["limited"] = not answer["used_avx512"]
            except WorkerFailed as error:
                failures[peer.name] = str(error)
            except AssertionError as error:
                failures[peer.name] = f"wrong, not timed: {error}"
    return loads, failures


def _row(case: Case, peer: Peer, samples: dict[str, Samples], bound: float | None) -> harness.Row:
    own = samples[peer.name]
    times = own.quartiles()
    rate = case.flops / times["50%"] / 1e9
    return {
        "suite": "peers",
        "case": str(case),
        **case.labels(),
        "provider": peer.name,
        "batch": case.batch,
        "dtype": peer.precision,
        "threads": case.threads,
        "seconds": times,
        "rounds": len(own.clean),
        "dropped": own.dropped,
        "gflops": rate,
        "fma_peak_gflops": bound,
        "share_of_fma_peak": rate / bound if bound else None,
        "speedup": {name: own.ratio(other) for name, other in samples.items() if name != peer.name},
        "versions": peer.versions(),
        **facts(),
    }
