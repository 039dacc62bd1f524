"""Workers in turns, A B C A B C ..., without the turns in which the machine was not all ours."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import sleep

from mnv2_kernels.timing import quartiles

# Thread pools spin for some milliseconds after their last task; the next turn begins after that.
PAUSE = 0.02


@dataclass
class Samples:
    """What one worker's turns gave, round by round; None where time was stolen meanwhile."""

    values: list[float | None]

    @property
    def clean(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def dropped(self) -> int:
        return len(self.values) - len(self.clean)

    def quartiles(self) -> dict[str, float]:
        lower, middle, upper = quartiles(self.clean)
        return {"25%": lower, "50%": middle, "75%": upper}

    def ratio(self, other: "Samples") -> float | None:
        """Median of the other's over these, round by round; None without a round of both."""
        pairs = zip(self.values, other.values, strict=True)
        ratios = [b / a for a, b in pairs if a is not None and b is not None]
        return statistics.median(ratios) if ratios else None


def take_turns(
    turns: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    stolen: Callable[[], int],
    pause: Callable[[], None] = lambda: sleep(PAUSE),
) -> dict[str, Samples]:
    """Let everyone have `rounds` turns that count.

    The order is the same in every round, begun one later each time. A turn during which stolen()
    grew does not count; there are further rounds then, up to twice as many in all.

    Args:
        turns: by name; each gives one figure.
        stolen: time that the machine has taken from this system so far.
        pause: between turns.
    """
    samples = {name: Samples([]) for name in turns}
    names = list(turns)
    for number in range(2 * rounds):
        if all(len(found.clean) >= rounds for found in samples.values()):
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            pause()
            before = stolen()
            value = turns[name]()
            samples[name].values.append(value if stolen() == before else None)
    return samples


def stolen_ticks(stat: Path = Path("/proc/stat")) -> int:
    """Hundredths of a second that the hypervisor gave to others, of all cores; 0 off Linux."""
    if not stat.exists():
        return 0
    fields = stat.read_text().split("\n", 1)[0].split()
    return int(fields[8]) if len(fields) > 8 else 0
