"""Which modules of other libraries are inverted residual blocks: one file per family.

A recogniser takes a module and returns its layers (`fold.BlockLayers`), None where the module is
something else, or raises `Declined` where it is such a block but cannot be fused exactly. It looks
at children and their sizes, never at class names alone, and reads the residual flag instead of
inferring it. To add a family, write a file with a `recognize(module)` that hands its layers in
the order they run to `layers.assemble`, and add it to RECOGNIZERS; docs/recognizers.md says how.
Blocks that are no module of their own are in `chains`.
"""

import torch
from torch import nn

from ..block.fold import BlockLayers
from . import chains, lukemelas, relatives, sequential, stages, timm, transformers
from .declined import Declined
from .layers import check_untouched

# The first that does not answer None decides.
RECOGNIZERS = (
    sequential.recognize,
    timm.recognize,
    transformers.recognize,
    lukemelas.recognize,
    stages.recognize,
    relatives.recognize,
    chains.recognize,
)

__all__ = ["RECOGNIZERS", "Declined", "chains", "check_module", "recognize"]


def recognize(module: nn.Module) -> BlockLayers | None:
    """The layers of an inverted residual block, or None where `module` is something else.

    Raises:
        Declined: the module is such a block but cannot be fused exactly; the sentence says why.
    """
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward:
        return None  # A container: its children are called one by one by somebody else.
    for recognizer in RECOGNIZERS:
        layers = recognizer(module)
        if layers is not None:
            check_untouched(module)
            return layers
    return None


def check_module(function: str, module: object, argument: str = "model") -> None:
    """TypeError, in the name of a public function, where its argument is not a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{function}: {argument} must be a torch.nn.Module, got {type(module).__name__}"
        )
