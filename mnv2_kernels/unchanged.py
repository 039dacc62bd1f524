"""Whether a module is called as it was when somebody looked at what its forward does."""

from operator import itemgetter

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, tuple, type(None))


class Unchanged:
    """A module as it is now: its class, its children and, with `attributes`, the plain values on
    it (numbers, strings, ...), which a forward may branch on.
    """

    def __init__(self, module: nn.Module, *, attributes: bool = False):
        self.module = module
        self.kind = type(module)
        self.children = list(module._modules.values())
        values = vars(module)
        self.names = set(values)
        plain = [name for name, value in values.items() if isinstance(value, _PLAIN)]
        self.plain = itemgetter(*plain) if attributes else None
        self.plain_values = self.plain(values) if attributes else None

    @property
    def hooks(self) -> list[dict]:
        """Those that a call of the module calls too."""
        return [getattr(self.module, kind) for kind in _HOOKS]

    def holds(self) -> bool:
        """Whether a call of the module still does the same, hooks apart."""
        module, values = self.module, self.module.__dict__
        if type(module) is not self.kind or "forward" in values:
            return False
        if list(module._modules.values()) != self.children:
            return False
        if self.plain is None:
            return True
        try:
            if self.plain(values) != self.plain_values:
                return False
        except KeyError:
            return False
        # A new attribute may stand in for a method.
        new = () if len(values) == len(self.names) else values.keys() - self.names
        return not any(hasattr(self.kind, name) for name in new)

    def __getstate__(self) -> dict:
        # The class of a whole network or of a frozen norm cannot be pickled.
        return {**self.__dict__, "kind": type(self.module) is self.kind}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.kind = type(self.module) if state["kind"] else None
