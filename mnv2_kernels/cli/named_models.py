"""Models by name for the command line: of this package, torchvision, timm, or the user's own."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, util
from inspect import signature
from types import ModuleType

import torch
from torch import Tensor, nn

from ..modules.mobilenet_v2 import mobilenet_v2
from ..network.lower import image_shape
from ..ops.optional import require

_KEPT_ALIVE: list[torch.library.Library] = []
_OWN = "mobilenet_v2"
FORMS = f"{_OWN}, torchvision:NAME, timm:NAME or MODULE:FUNCTION"


class UnknownModel(ValueError):
    """There is no model of that name, or not at that width; the sentence says which there are."""


@dataclass(frozen=True)
class Chosen:
    """The model that was asked for, in evaluation mode, and the images to give it."""

    name: str
    model: nn.Module
    image: tuple[int, int, int]
    batch: int

    def random_images(self) -> Tensor:
        """x (batch, C, H, W).

        Raises:
            UnknownModel: there is no memory for them.
        """
        try:
            return torch.randn(self.batch, *self.image)
        except RuntimeError as error:
            sizes = (self.batch, *self.image)
            raise UnknownModel(f"images of {sizes} must fit the memory: {error}") from error


def add_options(command: argparse.ArgumentParser, count: Callable, number: Callable) -> None:
    """The options that `chosen` reads; `count` and `number` parse positive values."""
    add = command.add_argument
    add("--model", default=_OWN, metavar="NAME", help=f"{FORMS}, which returns a module")
    add("--width", type=number, help="multiplier of MobileNetV2")
    add("--batch", type=count, default=1, help="images at once")
    add("--resolution", type=count, default=224, help="rows and columns of an image, 3 channels")
    add("--input-shape", metavar="C,H,W", help="of an image, where that is another one")


def chosen(options: argparse.Namespace) -> Chosen:
    """What the options ask for.

    Raises:
        UnknownModel: there is no such model, or the input shape is none.
        MissingPackage: torchvision or timm is not installed.
    """
    image = (3, options.resolution, options.resolution)
    if options.input_shape is not None:
        sizes = options.input_shape.split(",")
        if len(sizes) != 3 or not all(size.strip().isdecimal() for size in sizes):
            raise UnknownModel(f"--input-shape must be C,H,W, got {options.input_shape}")
        try:
            image = image_shape("--input-shape", [int(size) for size in sizes])
        except ValueError as error:
            raise UnknownModel(str(error)) from None
    model = named_model(options.model, options.width)
    return Chosen(options.model, model, image, options.batch)


def named_model(name: str, width_mult: float | None = None) -> nn.Module:
    """The model in evaluation mode; those of libraries have random weights.

    Args:
        name: `mobilenet_v2` (this package's), `torchvision:NAME`, `timm:NAME`, or
            `MODULE:FUNCTION`, a function without arguments that returns a module.
        width_mult: of MobileNetV2, None for 1.0; other names say the width themselves.

    Raises:
        UnknownModel: there is no such model, or it has no other width.
        MissingPackage: torchvision or timm is not installed.
    """
    library, colon, model = name.partition(":")
    if name == _OWN:
        return mobilenet_v2(1.0 if width_mult is None else width_mult).eval()
    if not (library and colon and model):
        raise UnknownModel(f"--model must be {FORMS}, got {name}{_nearest(name)}")
    if name == "torchvision:mobilenet_v2" and width_mult is not None:
        require("torchvision")
        models = import_torchvision("torchvision.models")
        return models.mobilenet_v2(width_mult=width_mult).eval()
    if width_mult is not None:
        raise UnknownModel(f"--width must be left out for {name}, got {width_mult}")
    if library in _LIBRARIES:
        return _of_library(library, model).eval()
    return _users_own(library, model).eval()


def _of_library(library: str, name: str) -> nn.Module:
    names, make = _LIBRARIES[library]()
    # timm's names may end with a tag of the weights, which are not asked for.
    if name.partition(".")[0] not in names:
        said = f"--model must be a model that {library} has, got {name}"
        raise UnknownModel(said + _nearest(f"{library}:{name}"))
    try:
        return make(name)
    except Exception as error:
        said = f"--model must be a model that {library} makes, got {name}: {error}"
        raise UnknownModel(said) from error


def _torchvision() -> tuple[list[str], Callable[[str], nn.Module]]:
    require("torchvision")
    models = import_torchvision("torchvision.models")

    def make(name: str) -> nn.Module:
        # Detectors and segmenters would download weights for their backbone.
        takes = signature(models.get_model_builder(name)).parameters
        backbone = {"weights_backbone": None} if "weights_backbone" in takes else {}
        return models.get_model(name, weights=None, **backbone)

    return models.list_models(), make


def _timm() -> tuple[list[str], Callable[[str], nn.Module]]:
    require("timm", "torchvision")
    import_torchvision("torchvision")
    timm = import_module("timm")
    return timm.list_models(), lambda name: timm.create_model(name, pretrained=False)


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm}


def _users_own(module: str, function: str) -> nn.Module:
    """What a function of the user's own returns; modules of the current folder are found too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    wrong = f"--model must be {FORMS}, got {module}:{function}"
    try:
        found = import_module(module)
    except Exception as error:
        near = _nearest(f"{module}:{function}")
        raise UnknownModel(f"{wrong}; importing {module}: {error}{near}") from error
    if not hasattr(found, function):
        near = difflib.get_close_matches(function, vars(found), 3)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise UnknownModel(f"{wrong}; {module} has no {function}{hint}")
    made = getattr(found, function)
    if not isinstance(made, nn.Module):
        try:
            made = made()
        except Exception as error:
            raise UnknownModel(f"{wrong}; calling it: {error}") from error
    if not isinstance(made, nn.Module):
        raise UnknownModel(f"{wrong}; it must give a module, got {type(made).__name__}")
    return made


def _nearest(name: str) -> str:
    """Which names are like one that there is no model of, for the end of a sentence."""
    *library, asked = re.split("[:/]", name)
    named: dict[str, list[str]] = {_OWN: [_OWN]}
    for known, find in _LIBRARIES.items():
        if all(util.find_spec(package) for package in {known, "torchvision"}):
            for model in find()[0]:
                named.setdefault(model, []).append(f"{known}:{model}")
    near = [asked] if asked in named else difflib.get_close_matches(asked, named, 3)
    found = [full for model in near for full in named[model]]
    of_library = [full for full in found if library and full.startswith(f"{library[0]}:")]
    shown = (of_library or found)[:3]
    return f": did you mean {' or '.join(shown)}?" if shown else ""


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
