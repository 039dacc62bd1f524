"""Models by name for the command line: this package's, torchvision's and timm's."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import nn

from ..modules.mobilenet_v2 import mobilenet_v2
from ..optional import require

_KEPT_ALIVE: list[torch.library.Library] = []


class UnknownModel(ValueError):
    """There is no model of that name, or not at that width; the sentence says which there are."""


def named_model(name: str, width_mult: float | None = None) -> nn.Module:
    """The model in evaluation mode, with random weights.

    Args:
        name: `mobilenet_v2` (this package's), `torchvision:NAME` or `timm:NAME`.
        width_mult: of MobileNetV2, None for 1.0; timm's names say the width themselves.

    Raises:
        UnknownModel: there is no such model, or it has no other width.
        MissingPackage: torchvision or timm is not installed.
    """
    library, _, model = name.rpartition(":")
    makers: dict[str, Callable[[str, float | None], nn.Module]] = {
        "": _own,
        "torchvision": _of_torchvision,
        "timm": _of_timm,
    }
    if library not in makers:
        raise UnknownModel(
            f"--model must be mobilenet_v2, torchvision:NAME or timm:NAME, got {name}"
        )
    return makers[library](model, width_mult).eval()


def _own(name: str, width_mult: float | None) -> nn.Module:
    if name != "mobilenet_v2":
        raise UnknownModel(
            f"--model must be mobilenet_v2, torchvision:NAME or timm:NAME, got {name}"
        )
    return mobilenet_v2(1.0 if width_mult is None else width_mult)


def _of_torchvision(name: str, width_mult: float | None) -> nn.Module:
    require("torchvision")
    models = import_torchvision("torchvision.models")
    if name not in models.list_models():
        raise UnknownModel(f"--model must be a model that torchvision has, got {name}")
    if width_mult is None:
        return models.get_model(name, weights=None)
    if name != "mobilenet_v2":
        raise UnknownModel(f"--width must be left out for torchvision:{name}, got {width_mult}")
    return models.mobilenet_v2(width_mult=width_mult)


def _of_timm(name: str, width_mult: float | None) -> nn.Module:
    require("timm", "torchvision")
    import_torchvision("torchvision")
    timm = import_module("timm")
    if not timm.is_model(name):
        raise UnknownModel(f"--model must be a model that timm has, got {name}")
    if width_mult is not None:
        raise UnknownModel(f"--width must be left out for timm:{name}, got {width_mult}")
    return timm.create_model(name, pretrained=False)


def import_torchvision(name: str) -> ModuleType:
    """A module of torchvision, also where its compiled operators do not fit this torch."""
    try:
        return import_module(name)
    except RuntimeError:
        # Importing it needs nothing but the names of these two operators.
        library = torch.library.Library("torchvision", "FRAGMENT")
        _KEPT_ALIVE.append(library)
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        return import_module(name)
