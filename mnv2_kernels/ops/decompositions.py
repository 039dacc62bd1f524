"""Decompositions of the ops to aten.

>>> exported = torch.export.export(model, (x,))
>>> exported = exported.run_decompositions(DECOMPOSITIONS)

The table holds our operators alone; to have the rest in core aten too, update
`torch.export.default_decompositions()` with it and pass that.
"""

import torch
from torch import Tensor

from ..block.fold import FoldedWeights, fold_flat
from . import reference


def _layers_decomposed(x: Tensor, layers, present, eps, *settings) -> Tensor:
    return _decomposed(x, *fold_flat(layers, present, eps), *settings)


def _decomposed(x: Tensor, *arguments) -> Tensor:
    """The op's arguments -> (N, C_out, H_out, W_out), dense channels_last, as the op gives."""
    *tensors, stride, padding, dilation, residual = arguments[:10]
    return reference.inverted_residual(
        x,
        FoldedWeights(*tensors, *map(tuple, arguments[10:])),
        stride=stride,
        padding=padding,
        dilation=dilation,
        residual=residual,
    )


DECOMPOSITIONS = {
    torch.ops.mnv2.inverted_residual.default: _decomposed,
    torch.ops.mnv2.inverted_residual_triton.default: _decomposed,
    torch.ops.mnv2.inverted_residual_layers.default: _layers_decomposed,
}
