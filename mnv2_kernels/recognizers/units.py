"""Modules of other libraries that are a convolution with its norm and its activation.

Each function below takes such a module apart: its layers in the order they run, or None where the
module is something else.
"""

from collections.abc import Callable

import torch
from torch import nn

from .declined import Declined


class PadsLikeTensorFlow(nn.Module):
    """Stands before a convolution whose module pads as TensorFlow's SAME does, at run time."""


def _of_transformers(module: nn.Module) -> list[nn.Module | None] | None:
    """MobileNetV2ConvLayer and MobileViTConvLayer; `config.tf_padding` pads by the input's size."""
    found = module._modules.keys()
    if not {"convolution"} <= found <= {"convolution", "normalization", "activation"}:
        return None
    pads = getattr(getattr(module, "config", None), "tf_padding", False)
    before = PadsLikeTensorFlow() if pads else None
    return [
        before,
        *(module._modules.get(n) for n in ("convolution", "normalization", "activation")),
    ]


def _of_mmcv(module: nn.Module) -> list[nn.Module | None] | None:
    """ConvModule of mmcv, as in mmpretrain, mmsegmentation and mmdetection."""
    order = getattr(module, "order", None)
    if "conv" not in module._modules or not isinstance(order, tuple):
        return None
    if set(order) != {"conv", "norm", "act"} or not hasattr(module, "with_explicit_padding"):
        return None
    if order != ("conv", "norm", "act"):
        raise Declined(f"ConvModule runs its layers in another order: {', '.join(order)}")
    if module.with_explicit_padding:
        raise Declined("ConvModule pads by a layer of its own")
    norm = module._modules[module.norm_name] if module.with_norm else None
    activation = module._modules["activate"] if module.with_activation else None
    return [module.conv, norm, activation]


def _of_cvnets(module: nn.Module) -> list[nn.Module | None] | None:
    """ConvLayer2d of ml-cvnets: a Sequential named `block`."""
    if set(module._modules) != {"block"} or not hasattr(module, "norm_name"):
        return None
    block = module.block
    if not isinstance(block, nn.Sequential) or "conv" not in block._modules:
        return None
    return [block] if block._modules.keys() <= {"conv", "norm", "act"} else None


def _of_timm(module: nn.Module) -> list[nn.Module | None] | None:
    """ConvNormAct of timm; the activation is inside the norm."""
    # Others have modules of the same children, with an activation in their forward.
    if not type(module).__module__.startswith("timm."):
        return None
    if not {"conv", "bn"} <= module._modules.keys() <= {"conv", "bn", "aa"}:
        return None
    return [module.conv, module.bn, module.aa]


UNITS: tuple[Callable[[nn.Module], list[nn.Module | None] | None], ...] = (
    _of_transformers,
    _of_mmcv,
    _of_cvnets,
    _of_timm,
)


def unit_layers(module: nn.Module) -> list[nn.Module] | None:
    """The layers of such a module in the order they run; None where it is something else.

    Raises:
        Declined: it runs its layers in a way that cannot be fused.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    for layers_of in UNITS:
        layers = layers_of(module)
        if layers is not None:
            return [layer for layer in layers if layer is not None]
    return None
