"""MobileNetV2's inverted residual in one pass: the expanded tensor never exists in memory.

>>> import mnv2_kernels as mk
>>> model = mk.fuse(model)
"""

from .backends import backends
from .fold import FoldedWeights
from .freeze import freeze_bn
from .fuse import fold, fuse, unfuse
from .modules import InvertedResidual, mobilenet_v2
from .ops import inverted_residual
from .plan import plan
from .report import explain

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
