"""MobileNetV2's inverted residual in one pass: the expanded tensor never exists in memory.

>>> import mnv2_kernels as mk
>>> model = mk.fuse(model)

`dir(mk)` lists all that is public; `mnv2_kernels.types` names the types of results for annotations.
"""

from .block.fold import FoldedWeights
from .fuse.explain import explain
from .fuse.fuse import fold, fuse, unfuse
from .modules.freeze import freeze_bn
from .modules.mobilenet_v2 import InvertedResidual, mobilenet_v2
from .network.plan import plan
from .ops.backends import backends
from .ops.inverted_residual import inverted_residual

# The one place of the version: pyproject.toml reads it from here.
__version__ = "0.2.0"

__all__ = [
    "FoldedWeights",
    "InvertedResidual",
    "backends",
    "explain",
    "fold",
    "freeze_bn",
    "fuse",
    "inverted_residual",
    "mobilenet_v2",
    "plan",
    "unfuse",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
