"""Whether modules are exactly what they were: one look at everything, where asking for each thing
that matters would take longer than a small network.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .guard import Change, Guard


class Snapshot:
    """Modules as they are now: a guard that is asked only whether anything has changed since."""

    def __init__(self, modules: Iterable[nn.Module]):
        self._guard: Guard | None = Guard(modules)

    def holds(self) -> bool:
        """Whether nothing has changed: False also where something has that does not matter, or
        where changes cannot be seen.
        """
        guard = self._guard  # Read once: another thread may drop it.
        if guard is not None and guard.check() is not Change.SAME:
            self._guard = guard = None
        return guard is not None


class Remembered:
    """What a look at modules came to, as long as they are exactly what they were.

    A snapshot takes longer than a look: after each that has not held for a while, the next one has
    to wait for twice as many looks that saw no change.
    """

    _WORTH = 8  # calls
    _LONGEST = 255  # looks

    def __init__(self) -> None:
        self.forget()
        self._waits = self._quiet = self._held = 0

    def forget(self) -> None:
        self._known: tuple[Snapshot, Any] | None = None

    def get(self) -> Any:
        """None where nothing is known, or no longer."""
        known = self._known  # Read once: another thread may drop it.
        if known is None:
            return None
        snapshot, value = known
        if snapshot.holds():
            self._held += 1
            return value
        self.forget()
        self._waits = 0 if self._held >= self._WORTH else self._longer()
        return None

    def offer(self, modules: Callable[[], Iterable[nn.Module]], look: Callable[[], Any]) -> None:
        """Remember what `look` gives; None is not remembered.

        To be called by who has just looked and seen no change.
        """
        self._quiet += 1
        if self._quiet <= self._waits:
            return
        self._quiet = self._held = 0
        snapshot = Snapshot(modules())
        # Behind the snapshot: what changes from now on, it sees.
        value = look()
        if value is not None and snapshot.holds():
            self._known = snapshot, value
        else:
            self._waits = self._longer()

    def _longer(self) -> int:
        return min(2 * self._waits + 1, self._LONGEST)
