"""MobileNetV2's inverted residual in one pass: the expanded tensor never exists in memory.

>>> import mnv2_kernels as mk
>>> model = mk.fuse(model)
"""

from .block.fold import FoldedWeights
from .fuse.explain import explain
from .fuse.fuse import fold, fuse, unfuse
from .modules.freeze import freeze_bn
from .modules.mobilenet_v2 import InvertedResidual, mobilenet_v2
from .network.plan import plan
from .ops.backends import backends
from .ops.inverted_residual import inverted_residual

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
