"""Whether modules are exactly what they were: one look at everything, where asking for each thing
that matters would take longer than a small network.
"""

from collections.abc import Iterable
from itertools import chain
from operator import itemgetter

from torch import nn

from . import extension
from .versions import optimizer_steps

_dicts_of = itemgetter(
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Snapshot:
    """Modules as they are now: their classes, attributes, children, hooks and tensors.

    The memory that tensors have now has to be kept by the caller, for no other to get the same
    address. Without the compiled extension no snapshot ever holds.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = list(modules)
        owns = [vars(module) for module in self._modules]
        self._dicts = [*owns, *chain.from_iterable(map(_dicts_of, owns))]
        self._steps = optimizer_steps()
        taking = None if extension.module is None else extension.module.Snapshot.take
        seen = taking and taking(self._modules, self._dicts)
        # No other object gets the address of one of these.
        values = [[*held, *held.values()] for held in self._dicts]
        lists = [value[:] for held in values for value in held if isinstance(value, list)]
        self._alive = (values, lists, [*map(type, self._modules)])
        self._seen = seen
        if not self.holds():
            self._seen = None  # Another thread has changed something meanwhile.

    def holds(self) -> bool:
        """Whether nothing has changed: False also where something has that does not matter, or
        where changes cannot be seen.
        """
        seen = self._seen
        return (
            seen is not None
            and self._steps == optimizer_steps()
            and seen.matches(self._modules, self._dicts)
        )
