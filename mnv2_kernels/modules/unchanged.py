"""Whether a module is called as it was when somebody looked at what its forward does."""

from copy import deepcopy
from operator import itemgetter

from torch import nn

from .freeze import thawed

_hooks_of = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)


class Unchanged:
    """A module as it is now: its class, its children and, with `attributes`, the plain values on
    it (numbers, strings, lists of them, ...), which a forward may branch on.
    """

    def __init__(self, module: nn.Module, *, attributes: bool = False):
        self.module = module
        self.kind = thawed(type(module))
        self.children = list(module._modules.values())
        values = vars(module)
        self.names = set(values) if attributes else None
        plain = [name for name, value in values.items() if _is_plain(value)]
        self.plain = itemgetter(*plain) if attributes else None
        self.plain_values = deepcopy(self.plain(values)) if attributes else None

    def holds(self) -> bool:
        """Whether a call of the module still does the same, and nobody listens to it."""
        module, values = self.module, self.module.__dict__
        if (
            any(_hooks_of(values))
            or "forward" in values
            or thawed(type(module)) is not self.kind
            or not self.has_its_children()
        ):
            return False
        if self.names is None:
            return True
        if values.keys() != self.names:
            # A new attribute may stand in for a method.
            new = values.keys() - self.names
            if self.names - values.keys() or any(hasattr(self.kind, name) for name in new):
                return False
        return self.plain(values) == self.plain_values

    def has_its_children(self) -> bool:
        return list(self.module._modules.values()) == self.children

    def replaced_methods(self) -> list[str]:
        """Attributes of the very module that are called in place of those of its class."""
        values = vars(self.module).items()
        return [name for name, v in values if callable(v) and hasattr(self.kind, name)]

    def __getstate__(self) -> dict:
        # The class of a whole network cannot be pickled.
        return {**self.__dict__, "kind": thawed(type(self.module)) is self.kind}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.kind = thawed(type(self.module)) if state["kind"] else None


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | type(None))
