"""What a forward computes of a number by adding and multiplying numbers, and clips in between.

Hard sigmoid and hard swish have many spellings: x * relu6(x + 3) / 6, x * clamp(x / 6 + 0.5, 0, 1).
Their formulas are the same to the last bit of each number. A formula multiplies once and adds once,
so that it is computed as exactly as those.
"""

from dataclasses import dataclass, replace
from math import inf, isinf


@dataclass(frozen=True)
class Formula:
    """t -> clip(factor * t + shift), and with `times_t` that times t."""

    factor: float = 1.0
    shift: float = 0.0
    lower: float = -inf
    upper: float = inf
    times_t: bool = False

    def scaled(self, number: float) -> "Formula | None":
        """Times a number; None where that is no formula."""
        if number == 1:
            return self
        if self.factor != 1 or not 0 < number < inf:
            return None
        values = (self.factor, self.shift, self.lower, self.upper)
        return Formula(*(number * value for value in values), self.times_t)

    def shifted(self, number: float) -> "Formula | None":
        """Plus a number; None where that is no formula."""
        if self.times_t or self.shift != 0 or isinf(number):
            return None
        values = (self.shift, self.lower, self.upper)
        return Formula(self.factor, *(value + number for value in values))

    def clipped(self, lower: float, upper: float) -> "Formula | None":
        """Between two bounds; None where that is no formula."""
        if self.times_t or self.is_clipped:
            return None
        return replace(self, lower=lower, upper=upper)

    def times(self, other: "Formula") -> "Formula | None":
        """The product of both, of the same number; None where that is no formula."""
        first, second = (other, self) if self.is_multiple else (self, other)
        scaled = first.scaled(second.factor)
        if not second.is_multiple or first.times_t or scaled is None:
            return None
        return replace(scaled, times_t=True)

    @property
    def is_clipped(self) -> bool:
        return (self.lower, self.upper) != (-inf, inf)

    @property
    def is_multiple(self) -> bool:
        return self.shift == 0 and not self.is_clipped and not self.times_t

    def __str__(self) -> str:
        factor = "" if self.factor == 1 else f"{self.factor:g} * "
        shift = f" {'+' if self.shift > 0 else '-'} {abs(self.shift):g}" if self.shift else ""
        text = f"{factor}x{shift}"
        if self.is_clipped:
            text = f"clamp({text}, {self.lower:g}, {self.upper:g})"
        elif self.times_t and shift:
            text = f"({text})"
        return f"x * {text}" if self.times_t else text


HARDSIGMOID = Formula(1 / 6, 0.5, 0.0, 1.0)
HARDSWISH = replace(HARDSIGMOID, times_t=True)
