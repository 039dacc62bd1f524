"""What was found out about modules, for as long as they are what they were."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from ..recognizers import with_originals
from .guard import Change, Guard

# Entries of a state: one for every shape or further argument that a forward depends on.
_MOST = 32
# After more changes of structure than this in consecutive calls, the layers run for a while:
# reading the forward takes longer than they do.
_PATIENCE = 3
_LONGEST_REST = 256  # calls
# Calls until the next attempt where changes cannot be seen.
_BLIND_REST = 16


class Entries:
    """Values by key, the last `_MOST` that were used."""

    def __init__(self) -> None:
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """None where there is none."""
        try:
            self._values.move_to_end(key)
            return self._values[key]
        except KeyError:
            return None

    def keep(self, key: Hashable, value: Any) -> None:
        self._values[key] = value
        # Another thread may drop one meanwhile.
        with suppress(KeyError):
            while len(self._values) > _MOST:
                self._values.popitem(last=False)


class State:
    """Modules as they were seen last, and what follows from that.

    readings: what does not depend on the values of weights. why_blind: why changes of the modules
    cannot be seen; nothing may then be kept.
    """

    def __init__(
        self,
        guard: Guard | None,
        why_blind: str | None = None,
        modules: Sequence[nn.Module] = (),
    ):
        self.guard = guard
        self._modules = modules
        self._modes: set[bool] | None = None
        self.why_blind = why_blind
        self.readings = Entries()
        self._of_weights = (guard and guard.version, Entries())

    def of_weights(self) -> Entries:
        """Results of the weights as they are now.

        Call this before reading a weight: a result of old weights is then never kept as one of new
        weights.
        """
        version, entries = self._of_weights
        if version != self.guard.version:
            entries = Entries()
            self._of_weights = self.guard.version, entries
        return entries

    def is_in_mode(self, training: bool) -> bool:
        """Whether `train(training)` would do nothing, as far as the structure says it."""
        if self._modes is None:
            modes = {module.training for module in self._modules}
            own = not all(_is_usual(type(module).train) for module in self._modules)
            self._modes = {True, False} if own else modes
        return self._modes == {training}

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter requires a gradient."""
        return self.guard.requires_grad


class Kept:
    """The state of a module and of all inside it, looked at before every use.

    Copies, by `copy.deepcopy` or pickle, begin with nothing known.
    """

    def __init__(self, root: nn.Module):
        self.__setstate__((root,))

    def __getstate__(self) -> tuple[nn.Module]:
        return (self._root,)

    def __setstate__(self, state: tuple[nn.Module]) -> None:
        (self._root,) = state
        self._state: State | None = None
        self._restless = self._rest = 0

    def look(self) -> State:
        """The state as it is now; another object where more than weights has changed."""
        state = self._state
        if state is not None and state.guard is not None:
            change = state.guard.check()
            if change is not Change.STRUCTURE:
                self._restless = 0
                return state
            self._restless += 1
            if self._restless > _PATIENCE:
                self._rest = min(2 ** (self._restless - _PATIENCE), _LONGEST_REST)
                self._state = State(None, "its modules have changed before each of the last calls")
                return self._state
        elif state is not None and self._rest > 0:
            self._rest -= 1
            return state
        modules = with_originals(self._root)
        guard = Guard(modules)
        self._state = state = State(guard if guard.watches else None, guard.why_blind, modules)
        if guard.watches:
            return state
        self._rest = _BLIND_REST
        return state

    def is_in_mode(self, training: bool) -> bool:
        """Whether all the modules are known to be in a mode, so that `train` has nothing to do.

        Servers call `eval()` before every request: for a network that takes longer than this look.
        """
        state = self._state
        if state is None or state.guard is None or not state.is_in_mode(training):
            return False
        return state.guard.check() is not Change.STRUCTURE


def _is_usual(train: Callable) -> bool:
    return train is nn.Module.train or train.__module__.partition(".")[0] == "mnv2_kernels"
