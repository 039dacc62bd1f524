"""From a model to the steps of a program: its chain of layers, read, then folded."""

from collections.abc import Sequence
from dataclasses import replace
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..block.config import NO_CLIP, NO_PADDING
from ..block.fold import BlockLayers, ConvNorm, fold_conv_norm
from ..modules.autograd import fold_without_graph
from ..recognizers import (
    AverageLayer,
    ConvLayer,
    Declined,
    Layer,
    LinearLayer,
    evaluation_mode,
    read,
    read_unknown,
    same_layers,
)
from .program import Block, Linear, Pointwise, Pool, Stem
from .program import Layer as Step


def chain_of(model: nn.Module, shape: tuple[int, int, int] | None = None) -> tuple[Layer, ...]:
    """The layers of a model in evaluation mode for images of `shape` (C, H, W), any number of them.

    Without a shape, for images of a usual size.

    Raises:
        Declined: the model is no chain of layers that a plan has; the sentence says why.
    """
    with evaluation_mode(model):
        if shape is None:
            layers = read_unknown(model, [model]).layers
        else:
            reading = read(model, (1, *shape), [model])
            layers = reading.layers
            if reading.is_sized and not same_layers(
                layers, read(model, (3, *shape), [model]).layers
            ):
                raise Declined("its forward depends on the number of images")
    check_steps(layers)
    return layers


def image_shape(function: str, input_shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of an `input_shape` with or without a number of images.

    Raises:
        TypeError, ValueError: in the name of a public function, where it is none.
    """
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
        kind = type(input_shape).__name__
        raise TypeError(f"{function}: input_shape must be a sequence of integers, got {kind}")
    sizes = tuple(input_shape)
    whole = all(isinstance(n, SupportsIndex) and not isinstance(n, bool | Tensor) for n in sizes)
    if not whole or len(sizes) not in (3, 4) or min(sizes) < 0 or min(sizes[-3:]) < 1:
        raise ValueError(f"{function}: input_shape must be (C, H, W) or (N, C, H, W), got {sizes}")
    if max(sizes) >= 2**31:
        raise ValueError(f"{function}: input_shape must be below 2**31 in all sizes, got {sizes}")
    channels, height, width = map(index, sizes[-3:])
    return channels, height, width


def lower(layers: Sequence[Layer], names: Sequence[str] | None = None) -> list[tuple[str, Step]]:
    """The steps of layers, each with its name; weights are copies, but that of a classifier.

    `check_steps` must have passed the layers.
    """
    steps: list[tuple[str, Step]] = []
    with torch.inference_mode(False), torch.no_grad():
        for layer, name in zip(layers, names or [""] * len(layers), strict=True):
            step = _step(layer)
            if isinstance(step, Pool) and steps:
                name, before = steps[-1][0] or name, steps[-1][1]
                if isinstance(before, Pointwise):
                    # A 1x1 convolution and the mean over its result are one step.
                    steps.pop()
                    step = Pool(*vars(before).values())
                else:
                    name = "average"
                    channels = _out_channels(before)
                    step = replace(step, in_channels=channels, out_channels=channels)
            steps.append((name, step))
    return steps


def check_steps(layers: Sequence[Layer]) -> None:
    """Decline layers that have no step, or none in their place."""
    if not layers:
        raise Declined("it has no layers")
    averaged = False
    for i, layer in enumerate(layers):
        match layer:
            case LinearLayer() if not averaged:
                raise Declined("a fully connected layer must follow an average over all pixels")
            case LinearLayer():
                pass
            case AverageLayer() if i == 0 or averaged:
                raise Declined("an average over all pixels must follow a convolution")
            case AverageLayer() if not layer.is_flat:
                raise Declined("an average over all pixels must be flattened")
            case AverageLayer():
                averaged = True
            case _ if averaged:
                raise Declined("only fully connected layers may follow an average over all pixels")
            case BlockLayers() if layer.pads != NO_PADDING:
                raise Declined("a block pads its input before the expansion")
            case BlockLayers() if layer.lead is not None:
                raise Declined("a block has another depthwise before its expansion")
            case ConvLayer() if not layer.is_pointwise:
                _check_stem(layer)
                if i > 0:
                    raise Declined("a 3x3 convolution must be the first layer")


def _check_stem(layer: ConvLayer) -> None:
    found = (layer.kernel_size, layer.stride, layer.dilation, layer.groups)
    if found != ((3, 3), (2, 2), (1, 1), 1) or max(layer.padding) > 2:
        raise Declined(
            "a convolution outside of blocks must be 1x1 with stride 1, 1 group and no padding, or"
            " the first layer and 3x3 with stride 2, 1 group and at most 2 zeros around its input,"
            f" got kernel_size={found[0]}, stride={found[1]}, dilation={found[2]},"
            f" groups={found[3]}, padding={layer.padding}"
        )


def _step(layer: Layer) -> Step:
    match layer:
        case BlockLayers():
            return Block(layer.config, fold_without_graph(layer))
        case ConvLayer():
            weight, bias = fold_conv_norm(layer.stage)
            out_channels, in_channels = weight.shape[:2]
            clip = layer.stage.clip
            if layer.is_pointwise:
                weight = weight[:, :, 0, 0].t().contiguous()
                return Pointwise(in_channels, out_channels, weight, bias, clip)
            weight = weight.permute(3, 2, 1, 0).contiguous()
            return Stem(in_channels, out_channels, layer.padding, weight, bias, clip)
        case AverageLayer():
            return Pool(0, 0, None, None, NO_CLIP)
    return _linear(layer.stage)


def _linear(stage: ConvNorm) -> Linear:
    conv = stage.conv
    if stage.norm is None:
        weight, bias = conv.weight.detach(), conv.bias
    else:
        weight, bias = fold_conv_norm(stage)
    weight = weight.flatten(1).contiguous()
    # Where a bias is used in place, its values are those of now too: a guard sees changes.
    if bias is not None:
        bias = bias.detach().contiguous()
        # PyTorch refuses a bias of another dtype than the weight; so must the check of a program.
        if bias.dtype == weight.dtype:
            bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return Linear(weight.shape[1], weight.shape[0], weight, bias, stage.clip)


def _out_channels(step: Step) -> int:
    return step.config.out_channels if isinstance(step, Block) else step.out_channels


def cast(step: Step, dtype: torch.dtype | None) -> Step:
    """The step with weights in a dtype; biases stay in float32 at least."""
    if dtype is None:
        return step
    if isinstance(step, Block):
        weights = step.weights
        gate = weights.gate
        if gate is not None:
            gate = _cast_weights(gate, ("w_squeeze", "w_excite"), dtype)
        weights = _cast_weights(weights, ("w_expand", "w_dw", "w_project"), dtype)
        return replace(step, weights=replace(weights, gate=gate))
    weight = step.weight
    return step if weight is None else replace(step, weight=weight.to(dtype))


def _cast_weights(folded: Any, names: Sequence[str], dtype: torch.dtype) -> Any:
    tensors = {name: t for name in names if (t := getattr(folded, name)) is not None}
    return replace(folded, **{name: t.to(dtype) for name, t in tensors.items()})


def names_of(layers: Sequence[Layer], model: nn.Module) -> list[str]:
    """Where in the model each layer is: the innermost module that has all of it inside, and
    nothing but it.
    """
    names = {module: name for name, module in model.named_modules()}
    return [_name_of(layer, names, model) for layer in layers]


def _name_of(layer: Layer, names: dict[nn.Module, str], model: nn.Module) -> str:
    match layer:
        case BlockLayers():
            paths = [names[stage.conv].split(".") for stage in layer.stages]
        case ConvLayer() | LinearLayer():
            return names[layer.stage.conv]
        case _:
            return "average"
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common:
        parent = model.get_submodule(".".join(common[:-1]))
        if sum(child is not None for child in parent._modules.values()) > 1:
            break
        common.pop()
    return ".".join(common)
