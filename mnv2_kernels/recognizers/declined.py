"""How a recogniser says no."""

from torch import nn


class Declined(Exception):
    """An inverted residual block that cannot be fused exactly; the sentence says why."""


def describe(module: nn.Module) -> str:
    """The class of a module for a sentence."""
    name = type(module).__name__
    return f"quantised {name}" if "quantized" in type(module).__module__ else name
