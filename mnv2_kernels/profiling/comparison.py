"""One model executed in several ways on one input: times in turns, speed, memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .memory import peak_bytes_again
from .timing import fma_peak, interleave, median, speedup

# A ratio below is noise.
_FASTER = 1.05


@dataclass(frozen=True)
class Comparison:
    """Executions by name, "eager" and "folded" among them.

    samples: seconds, of the same round at the same place. peaks: bytes with input and result,
    without weights. flops: of one call. threads: of PyTorch. fma_peak: GFLOP/s that the machine
    reaches with them, None without the compiled extension.
    """

    samples: Mapping[str, list[float]]
    peaks: Mapping[str, int]
    flops: int
    threads: int
    fma_peak: float | None

    def over(self, name: str, baseline: str) -> float:
        """How many times as fast as the baseline."""
        return speedup(self.samples[name], self.samples[baseline])

    def rate(self, name: str) -> float:
        """GFLOP/s."""
        return self.flops / median(self.samples[name]) / 1e9

    @property
    def verdict(self) -> str:
        """What the fastest of the others gains, in a sentence."""
        others = [name for name in self.samples if name not in ("eager", "folded")]
        best = min(others, key=lambda name: median(self.samples[name]))
        eager, folded = (self.over(best, name) for name in ("eager", "folded"))
        nothing = "Nothing gains here: " if eager < _FASTER else ""
        return (
            f"{nothing}{best} is {eager:.1f}x as fast as eager and {folded:.1f}x as fast as folded,"
            f" in {self.peaks[best] / self.peaks['eager']:.0%} of eager's memory."
        )

    def document(self) -> dict[str, object]:
        """Every figure, for JSON."""
        return {
            "verdict": self.verdict,
            "flops": self.flops,
            "threads": self.threads,
            "fma_peak_gflops": self.fma_peak,
            "executions": {
                name: {
                    "seconds": median(samples),
                    "samples": samples,
                    "over_eager": self.over(name, "eager"),
                    "over_folded": self.over(name, "folded"),
                    "gflops": self.rate(name),
                    "peak_bytes": self.peaks[name],
                }
                for name, samples in self.samples.items()
            },
        }


def compare(
    executions: Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    *,
    rounds: int,
    most_seconds: float = inf,
    peaks: Mapping[str, int] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Time the executions on x in turns, and measure their memory where `peaks` does not say it.

    Takes `rounds` samples of each, fewer (but 3) once they have taken `most_seconds`. `tell` gets a
    few words before each round.
    """
    with FlopCounterMode(display=False) as counter:
        executions["eager"](x)
    calls = {name: lambda run=run: run(x) for name, run in executions.items()}
    bound = fma_peak()
    tell("timing: first calls")
    samples = interleave(calls, rounds=1)
    for taken in range(1, rounds):
        if taken >= 3 and sum(map(sum, samples.values())) >= most_seconds:
            break
        tell(f"timing: round {taken + 1} of {rounds}")
        for name, more in interleave(calls, rounds=1, warmup=0).items():
            samples[name] += more
    if peaks is None:
        tell("measuring memory")
        peaks = {name: x.nbytes + peak_bytes_again(call) for name, call in calls.items()}
    return Comparison(samples, peaks, counter.get_total_flops(), torch.get_num_threads(), bound)
