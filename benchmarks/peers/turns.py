"""Workers in turns, A B C A B C ..., without the turns in which the machine was not all ours."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import sleep

from mnv2_kernels.profiling.timing import quartiles

# Thread pools spin for some milliseconds after their last task; the next turn begins after that.
PAUSE = 0.02


@dataclass
class Samples:
    """What one worker's turns gave, round by round; None where too much time was lost."""

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
    turns: Mapping[str, Callable[[], tuple[float, float]]],
    *,
    rounds: int,
    tolerance: float,
    pause: Callable[[], None] = lambda: sleep(PAUSE),
) -> dict[str, Samples]:
    """Let everyone have `rounds` turns that count.

    The order is the same in every round, begun one later each time. There are further rounds where
    turns do not count, up to twice as many in all.

    Args:
        turns: by name; each gives one figure, and the share of its time that was lost.
        tolerance: the largest share lost with which a turn counts.
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
            value, lost = turns[name]()
            samples[name].values.append(value if lost <= tolerance else None)
    return samples
