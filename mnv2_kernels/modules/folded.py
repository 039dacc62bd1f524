"""A call of a block with folded weights: the weights, the op, and what is around it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..block.config import NO_PADDING, Padding
from ..block.fold import BlockLayers, fold_conv_norm, fold_layers
from ..ops.inverted_residual import OpArguments, op_arguments, run
from ..ops.mbconv import MBConvArguments
from .autograd import fold_without_graph, run_with_gradients, tensors_of
from .kept import State


class Folded(NamedTuple):
    """The op's arguments after x; weight and bias of the depthwise before it, if there is one."""

    arguments: OpArguments | MBConvArguments
    lead: tuple[Tensor, Tensor] | None


def run_block(
    layers: BlockLayers,
    backend: str,
    x: Tensor,
    arguments: OpArguments | MBConvArguments,
    lead: tuple[Tensor, Tensor] | None,
    trains: bool = False,
) -> Tensor:
    """The op, and what comes before it and after it."""
    inside = padded(x, layers.pads)
    if lead is not None:
        conv, padding = layers.lead, (0, 0)
        top, left, bottom, right = conv.padding
        if (top, left) == (bottom, right):
            padding = top, left
        else:
            inside = padded(inside, conv.padding)
        inside = F.conv2d(inside, *lead, conv.stride, padding, conv.dilation, len(lead[0]))
    if trains:
        y = run_with_gradients(backend, inside, arguments, tensors_of(layers))
    else:
        y = run(backend, inside, arguments)
    return y + x if layers.adds else y


def padded(x: Tensor, padding: Padding) -> Tensor:
    """x with zeros around it."""
    top, left, bottom, right = padding
    return x if padding == NO_PADDING else F.pad(x, (left, right, top, bottom))


def kept_folded(state: State, layers: BlockLayers) -> Folded:
    """What is folded, kept until a weight changes."""
    kept = state.of_weights()
    folded = kept.get(layers)
    if folded is None:
        # Blocks of several shapes of x have the same weights.
        key = (layers.expand, layers.depthwise, layers.project, layers.gate)
        weights = kept.get(key)
        if weights is None:
            weights = fold_without_graph(layers)
            kept.keep(key, weights)
        with torch.inference_mode(False), torch.no_grad():
            folded = Folded(op_arguments(weights, layers.config), _fold_lead(layers))
        kept.keep(layers, folded)
    return folded


def fold(layers: BlockLayers) -> Folded:
    """What is folded, with a graph to the layers."""
    return Folded(op_arguments(fold_layers(layers), layers.config), _fold_lead(layers))


def _fold_lead(layers: BlockLayers) -> tuple[Tensor, Tensor] | None:
    if layers.lead is None:
        return None
    weight, bias = fold_conv_norm(layers.lead.stage)
    return weight, bias.to(weight.dtype)
