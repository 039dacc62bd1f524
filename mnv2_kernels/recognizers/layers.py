"""What all families share: reading conv, norm, activation, ... into the stages of one block."""

from collections.abc import Iterable, Iterator
from itertools import chain
from math import inf

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..block.config import NO_CLIP, BlockConfig, Clip, Padding
from ..block.fold import BlockLayers, ConvNorm, same_padding_by_two
from .convolutions import is_drop, is_identity, is_zero_pad, read_padding, same_padding, zero_pad
from .declined import Declined, describe
from .units import PadsLikeTensorFlow, unit_layers


def children(module: nn.Module) -> dict[str, nn.Module]:
    """The children by name, without those that are None."""
    return dict(module.named_children())


def is_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other and does nothing else."""
    if not isinstance(module, nn.Sequential) or overrides_call(module):
        return False
    return type(module).forward is nn.Sequential.forward


def overrides_call(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward and its hooks."""
    kind = type(module)
    usual = kind.__call__ is nn.Module.__call__ and kind._call_impl is nn.Module._call_impl
    return not usual and not isinstance(module, torch.jit.ScriptModule)


def flatten(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested nn.Sequential in the order they run; anything else is one layer.

    Other libraries' modules of a convolution with its norm and activation are taken apart too.
    """
    inside = list(module) if is_sequential(module) else unit_layers(module)
    if inside is None:
        yield module
    else:
        for child in inside:
            yield from flatten(child)


def check_only(module: nn.Module, expected: Iterable[str]) -> None:
    """Decline a block with children, parameters or buffers beyond the expected children."""
    extra = {name: child for name, child in children(module).items() if name not in expected}
    if extra:
        found = ", ".join(f"{name} ({describe(child)})" for name, child in extra.items())
        raise Declined(f"it has further children: {found}")
    own = [*module._parameters, *module._buffers]
    if own:
        raise Declined(f"it has parameters or buffers of its own: {', '.join(own)}")


def read_flag(module: nn.Module, names: Iterable[str]) -> bool | None:
    """The residual flag: the attribute among `names` that is a bool; None where there is none."""
    flags = {name: getattr(module, name, None) for name in names}
    flags = {name: flag for name, flag in flags.items() if isinstance(flag, bool)}
    if len(set(flags.values())) > 1:
        raise Declined(f"its residual flags disagree: {flags}")
    return next(iter(flags.values()), None)


def assemble(layers: Iterable[nn.Module], residual: bool | None) -> BlockLayers:
    """The block that runs `layers` one after the other, then adds its input if `residual`.

    `residual` None says that no flag could be read; that is accepted only where stride or
    channels rule a residual out.

    Raises:
        Declined: the layers are not an inverted residual that can be fused exactly.
    """
    layers = list(layers)
    drops = tuple(layer for layer in layers if is_drop(layer))
    stages, paddings = read_stages([layer for layer in layers if layer not in drops], by_size=True)
    if len(stages) not in (2, 3):
        raise Declined(
            f"it has {len(stages)} convolutions, expected expansion, depthwise and projection"
        )
    *expand, depthwise, project = stages
    for name, stage, padding in zip(
        ("projection", "depthwise", "expansion"), stages[::-1], paddings[::-1], strict=False
    ):
        if name == "depthwise":
            _check_depthwise(stage.conv, padding)
        else:
            _check_pointwise(name, stage.conv, padding)
    for before, after in zip(stages, stages[1:], strict=False):
        if before.conv.out_channels != after.conv.in_channels:
            raise Declined(
                f"a convolution to {before.conv.out_channels} channels is followed by one from"
                f" {after.conv.in_channels}"
            )
    same = paddings[-2] is None
    block = BlockLayers(
        expand=expand[0] if expand else None,
        depthwise=depthwise,
        project=project,
        residual=bool(residual),
        padding=paddings[-2] or same_padding_by_two(depthwise.conv.kernel_size[0], 2, 2),
        same_padding=same,
        drops=drops,
    )
    _check_residual(block.config, residual)
    return block


def read_stages(
    layers: Iterable[nn.Module], *, by_size: bool = False
) -> tuple[list[ConvNorm], list[Padding | None]]:
    """Layers grouped into convolution, norm, clip, and the zeros padded before each convolution.

    With `by_size`, None stands for zeros that depend on the size of the input: TensorFlow's SAME.

    Raises:
        Declined: the layers are something else.
    """
    stages: list[ConvNorm] = []
    paddings: list[Padding | None] = []
    pending: Padding | None = None
    same = False
    for layer in layers:
        if is_identity(layer):
            continue
        if isinstance(layer, PadsLikeTensorFlow):
            same = True
        elif is_zero_pad(layer):
            pending = _add(pending, zero_pad(layer))
        elif isinstance(layer, nn.Conv2d):
            stages.append(ConvNorm(layer, None))
            padding = _read_padding(layer, same)
            if padding is None and not (by_size and pending is None):
                raise Declined(
                    f"{describe(layer)} at stride {layer.stride[0]} pads according to the size of"
                    " its input"
                )
            paddings.append(_add(pending, padding))
            pending, same = None, False
        elif not stages or pending is not None:
            raise Declined(f"{describe(layer)} stands where a convolution was expected")
        else:
            stages[-1] = append(stages[-1], layer)
    if pending is not None:
        raise Declined("the padding after the last convolution cannot be fused")
    return stages, paddings


def _read_padding(conv: nn.Conv2d, same: bool) -> Padding | None:
    """The zeros before a convolution; `same` says that its module pads as TensorFlow does."""
    own = read_padding(conv)
    if not same:
        return own
    if own is None or any(own):
        raise Declined(f"{describe(conv)} is padded both by its module and by itself, {own}")
    return same_padding(conv)


def append(stage: ConvNorm, layer: nn.Module) -> ConvNorm:
    """The stage with the norm or the activation that follows it; declines every other layer."""
    clip = _read_clip(layer)
    if clip is None:
        clip = _read_norm(layer, stage.conv.out_channels)
        if stage.norm is not None or stage.clip != NO_CLIP:
            raise Declined(f"{describe(layer)} does not follow a convolution")
        return ConvNorm(stage.conv, layer, clip)
    if stage.clip != NO_CLIP:
        raise Declined(f"{describe(layer)} follows another activation")
    return ConvNorm(stage.conv, stage.norm, clip)


def _read_clip(layer: nn.Module) -> Clip | None:
    """The bounds of an activation that is a clip; None for any other layer."""
    if isinstance(layer, torch.jit.ScriptModule):
        return None
    forward = type(layer).forward
    if forward is nn.ReLU.forward:
        return (0.0, inf)
    if isinstance(layer, nn.Hardtanh) and forward in (nn.Hardtanh.forward, nn.ReLU6.forward):
        return (float(layer.min_val), float(layer.max_val))
    return None


# Norms of timm and torchvision (also copied elsewhere) that are no torch class: batch norm with
# `drop` and `act` inside, and batch norm whose tensors are all buffers.
_NORMS_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
_FROZEN_NORM = "FrozenBatchNorm2d"


def _read_norm(norm: nn.Module, channels: int) -> Clip:
    """The clip inside a batch norm over `channels`; declines every other module."""
    kind, inside = type(norm).__name__, children(norm)
    clip: Clip = NO_CLIP
    activation = batch_norm_activation(norm)
    if activation is not None:
        if not is_identity(activation):
            clip = _read_clip(activation)
            if clip is None:
                raise Declined(f"{describe(activation)} in {kind} is not ReLU, ReLU6 or Hardtanh")
    elif "drop" in inside:
        raise Declined(f"{kind} drops values: {describe(inside['drop'])}")
    else:
        raise Declined(
            f"{describe(norm)} is not a convolution, a batch norm, ReLU, ReLU6 or Hardtanh"
        )
    missing = [n for n in ("running_mean", "running_var") if getattr(norm, n, None) is None]
    if missing:
        raise Declined(f"{kind} has no running statistics ({', '.join(missing)})")
    if not isinstance(getattr(norm, "eps", None), int | float):
        raise Declined(f"{kind} has no readable eps")
    if norm.running_mean.shape != (channels,):
        raise Declined(f"{kind} over {tuple(norm.running_mean.shape)} follows {channels} channels")
    return clip


def batch_norm_activation(norm: nn.Module) -> nn.Module | None:
    """The activation inside a batch norm, nn.Identity for a plain one; None for other modules."""
    kind, inside = type(norm).__name__, children(norm)
    if kind in _NORMS_WITH_ACTIVATION and inside.keys() <= {"drop", "act"}:
        drops = not is_identity(inside.get("drop", nn.Identity()))
        return None if drops else inside.get("act", nn.Identity())
    if not inside and (kind == _FROZEN_NORM or _is_batch_norm(norm)):
        return nn.Identity()
    return None


def _is_batch_norm(norm: nn.Module) -> bool:
    forwards = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    return isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and type(norm).forward in forwards


def _check_pointwise(name: str, conv: nn.Conv2d, padding: Padding | None) -> None:
    found = (tuple(conv.kernel_size), tuple(conv.stride), conv.groups, padding)
    if found != ((1, 1), (1, 1), 1, (0, 0, 0, 0)):
        raise Declined(
            f"the {name} must be a 1x1 convolution with stride 1, 1 group and no padding, got"
            f" kernel_size={found[0]}, stride={found[1]}, groups={found[2]}, padding={found[3]}"
        )


def _check_depthwise(conv: nn.Conv2d, padding: Padding | None) -> None:
    if not conv.groups == conv.in_channels == conv.out_channels:
        raise Declined(
            f"the depthwise must have one group per channel, got groups={conv.groups} for"
            f" {conv.in_channels} -> {conv.out_channels} channels"
        )
    for name, allowed in (("kernel_size", (3, 5)), ("stride", (1, 2)), ("dilation", (1, 2))):
        value = tuple(getattr(conv, name))
        if value not in [(a, a) for a in allowed]:
            raise Declined(f"the depthwise must have a {name} in {allowed}, got {value}")
    extent = conv.dilation[0] * (conv.kernel_size[0] - 1)
    if padding is None:
        if conv.dilation != (1, 1):
            raise Declined(
                f"{describe(conv)} pads according to the size of its input, which must go without"
                f" dilation, got {conv.dilation}"
            )
        return
    if not all(0 <= p <= extent for p in padding):
        raise Declined(f"the depthwise's padding must be from 0 to {extent}, got {padding}")


def _check_residual(config: BlockConfig, flag: bool | None) -> None:
    possible = config.stride == 1 and config.in_channels == config.out_channels
    if flag is None and possible:
        raise Declined("whether its input is added to the result cannot be read from a flag")
    top, left, bottom, right = config.padding
    extent = config.dilation * (config.kernel_size - 1)
    keeps_size = top + bottom == extent == left + right
    if flag and not (possible and keeps_size):
        raise Declined(f"its residual flag is set, but shapes differ: {config.name}")


def check_untouched(module: nn.Module) -> None:
    """Decline where someone relies on the inner modules, or their tensors cannot be folded."""
    for name, inner in module.named_modules():
        if parametrize.is_parametrized(inner):
            raise Declined(f"{name or 'this very module'} is parametrized")
        if "forward" in vars(inner) or "_conv_forward" in vars(inner):
            raise Declined(f"the forward of {name or 'this very module'} has been replaced")
        if overrides_call(inner):
            raise Declined(f"{name or 'this very module'} ({describe(inner)}) overrides __call__")
        if inner is not module and has_hooks(inner):
            raise Declined(f"{name} has hooks, which would not be called")
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise Declined(f"{name} is not initialised yet")
        if tensor.is_meta:
            raise Declined(f"{name} is on the meta device and has no values")
        if tensor.is_complex():
            raise Declined(f"{name} is complex")
        if tensor.layout != torch.strided:
            raise Declined(f"{name} is not dense: {tensor.layout}")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module calls somebody's hook too."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _add(first: Padding | None, second: Padding | None) -> Padding | None:
    return second if first is None else tuple(a + b for a, b in zip(first, second, strict=True))
