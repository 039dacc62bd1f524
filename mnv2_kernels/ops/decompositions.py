"""Decompositions of the ops to aten.

>>> exported = torch.export.export(model, (x,))
>>> exported = exported.run_decompositions(DECOMPOSITIONS)

The table holds our operators alone; to have the rest in core aten too, update
`torch.export.default_decompositions()` with it and pass that.
"""

import torch
from torch import Tensor

from ..block.fold import fold_flat
from . import reference


def _layers_decomposed(x: Tensor, layers, present, eps, *settings) -> Tensor:
    return reference.inverted_residual_op(x, *fold_flat(layers, present, eps)[:6], *settings)


def _mbconv_layers_decomposed(x: Tensor, layers, present, eps, *settings) -> Tensor:
    return reference.mbconv_op(x, *fold_flat(layers, present, eps), *settings)


DECOMPOSITIONS = {
    torch.ops.mnv2.inverted_residual.default: reference.inverted_residual_op,
    torch.ops.mnv2.inverted_residual_triton.default: reference.inverted_residual_op,
    torch.ops.mnv2.inverted_residual_layers.default: _layers_decomposed,
    torch.ops.mnv2.mbconv.default: reference.mbconv_op,
    torch.ops.mnv2.mbconv_triton.default: reference.mbconv_op,
    torch.ops.mnv2.mbconv_layers.default: _mbconv_layers_decomposed,
}
