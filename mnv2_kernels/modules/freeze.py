"""Batch norms that stay in evaluation mode, for fine-tuning with the statistics of a trained model.

`model.train()` would set them back; these ignore it. Fused blocks whose norms are all frozen run
fused in training mode too, forward and backward.
"""

import copy
from functools import cache
from typing import Any, SupportsIndex

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..recognizers import check_module


def freeze_bn(model: nn.Module, *, train_affine: bool = True, inplace: bool = False) -> nn.Module:
    """The model with every batch norm in evaluation mode for good, also after `model.train()`.

    Running statistics are used and no longer updated. The norms stay instances of their classes,
    under the same names and state_dict keys; copies and pickles of the model are frozen too.

    Example:
        >>> model = mk.freeze_bn(mk.mobilenet_v2()).train()
        >>> any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        False

    Args:
        model: any module, fused or not.
        train_affine: True leaves the norms' weights and biases as trainable as they are; False
            sets their `requires_grad` to False.
        inplace: freeze this very model instead of a copy.

    Raises:
        TypeError: model is not a module.
        ValueError: a batch norm has no running statistics to use; nothing is changed then.

    The usual way to fine-tune with small batches, as the Faster R-CNN of Ren et al.
    (arXiv 1506.01497) and its successors do.
    """
    check_module("freeze_bn", model)
    for name, norm in _batch_norms(model):
        if norm.running_mean is None or is_lazy(norm.running_mean):
            raise ValueError(
                f"freeze_bn: {name or 'model'} must have running statistics,"
                f" got {type(norm).__name__} without"
            )
    if not inplace:
        model = copy.deepcopy(model)
    for _, norm in _batch_norms(model):
        if not isinstance(norm, _Frozen):
            norm.__class__ = _frozen(type(norm))
        norm.eval()
        if not train_affine:
            for parameter in norm.parameters(recurse=False):
                parameter.requires_grad_(False)
    return model


def _batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


class _Frozen:
    """First base of a frozen norm's class."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class has no name that pickle could import it by.
        return _rebuild, (type(self).__mro__[2],), self.__getstate__()


@cache
def _frozen(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind`, ignoring `train()`; under its own name, by which some code recognises norms."""
    return type(kind.__name__, (_Frozen, kind), {"__module__": kind.__module__})


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    frozen = _frozen(kind)
    return frozen.__new__(frozen)
