"""From the layers of a recognised network to the steps of a program: folded and laid out."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..block.config import NO_CLIP
from ..block.fold import fold_layers
from ..fuse.sequential import FusedChain
from ..modules.fused_module import FusedModule, why_overridden
from ..recognizers import Declined, recognize
from . import read as network
from .convolutions import pointwise, stem
from .program import Block, Layer, Linear, Pool, Shape


def read_layers(model: nn.Module, shape: Shape) -> list[tuple[str, Layer]]:
    """The layers of a model in the order they run on images of `shape` (C, H, W), each with its
    name; weights are copies.

    Raises:
        Declined: the model is no chain that a plan has steps for.
    """
    if isinstance(model, FusedChain):
        model = model.original  # The same children, in a forward that can be traced.
    return list(_layers(network.read_network(model, _read_block).layers, shape))


def _read_block(module: nn.Module):
    if not isinstance(module, FusedModule):
        return recognize(module)
    if "forward" in vars(module):
        raise Declined("the forward of this very module has been replaced")
    changed = why_overridden(module) or module._watched.why_changed()
    if changed is not None:
        raise Declined(changed)
    return module.block_layers


def _layers(layers: Sequence[network.Layer], shape: Shape) -> Iterator[tuple[str, Layer]]:
    layers = list(layers)
    if not layers:
        raise Declined("it has no layers")
    channels = None
    averaged = False
    while layers:
        layer = layers.pop(0)
        if averaged and not isinstance(layer, network.Classifier):
            raise Declined(f"{layer.name} must not follow an average over all pixels")
        match layer:
            case network.Block(name, block):
                block = block.at(*shape[1:])
                with torch.no_grad():
                    weights = fold_layers(block)
                channels = block.config.out_channels
                step = Block(block.config, weights)
                shape = step.output_shape(shape)
                yield name, step
            case network.Convolution(name, stage) if stage.conv.kernel_size == (3, 3):
                step = stem(layer.stage, layer.name, layer.padding, shape)
                shape = step.output_shape(shape)
                yield name, step
            case network.Convolution(name):
                step = pointwise(layer.stage, layer.name, layer.padding)
                if layers and isinstance(layers[0], network.Pool):
                    _take_average(layers)
                    averaged = True
                    step = Pool(*vars(step).values())
                channels = step.out_channels
                shape = step.output_shape(shape)
                yield name, step
            case network.Classifier(name, linear):
                if not averaged:
                    raise Declined(f"{name} must follow an average over all pixels")
                bias = None if linear.bias is None else linear.bias.detach().float()
                weight = linear.weight.detach().clone()
                yield name, Linear(linear.in_features, linear.out_features, weight, bias)
            case network.Pool(name):
                layers.insert(0, layer)
                _take_average(layers)
                if channels is None:
                    raise Declined(f"{name} must follow a block")
                averaged = True
                yield name, Pool(channels, channels, None, None, NO_CLIP)
            case network.Flatten(name):
                raise Declined(f"{name} must follow an average over all pixels")


def _take_average(layers: list[network.Layer]) -> None:
    """Remove an average over pixels and its flattening from the front."""
    pool = layers.pop(0)
    if pool.keeps_dims:
        if not (layers and isinstance(layers[0], network.Flatten)):
            raise Declined(f"{pool.name} must be flattened")
        layers.pop(0)


def cast(layer: Layer, dtype: torch.dtype | None) -> Layer:
    """The layer with weights in a dtype; biases stay in float32 at least."""
    if dtype is None:
        return layer
    if isinstance(layer, Block):
        w = layer.weights
        tensors = {n: getattr(w, n) for n in ("w_expand", "w_dw", "w_project")}
        cast = {n: t if t is None else t.to(dtype) for n, t in tensors.items()}
        return replace(layer, weights=replace(w, **cast))
    weight = layer.weight
    return layer if weight is None else replace(layer, weight=weight.to(dtype))
