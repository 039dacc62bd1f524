"""`mnv2 classify IMAGE`: an image file, read safely, and its classes."""

import argparse
import warnings
from pathlib import Path

import torch

from ..fuse.fuse import fuse
from ..ops.optional import require
from .console import CannotRun
from .pretrained import efficientnet_lite0

# Decoders of formats that photographs come in; among the others is one that runs PostScript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def classify(options: argparse.Namespace) -> int:
    """Top five classes of an image file by the fused EfficientNet-Lite0."""
    image = read_image(options.image)
    network = efficientnet_lite0()
    model = fuse(network.model)
    with torch.inference_mode():
        probabilities = model(network.preprocess(image))[0].softmax(0)
    for probability, index in zip(*probabilities.topk(5), strict=True):
        print(f"{probability.item():.3f}  {network.class_names[index]}")
    return 0


def read_image(path: Path):
    """The image in a file, upright and RGB.

    Raises:
        CannotRun: there is no such file, or it holds no image that can be read safely.
    """
    require("PIL")
    from PIL import Image, ImageOps

    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise CannotRun(f"IMAGE must be an image file, and {path} {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as file:
                image, mode = ImageOps.exif_transpose(file), file.mode
                if mode.startswith("I;16"):
                    # Conversion to RGB would cut off at 255.
                    image = image.convert("I").point(lambda value: value / 257).convert("L")
                image = image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise CannotRun(f"IMAGE must have at most {limit} pixels, {path} has more") from error
    except Exception as error:
        # Decoders raise nearly anything on hostile bytes: OSError, ValueError, SyntaxError ...
        formats = ", ".join(IMAGE_FORMATS)
        raise CannotRun(
            f"IMAGE must be a complete {formats} file, {path} is not: {error}"
        ) from error
    if mode in ("I", "F"):
        raise CannotRun(f"IMAGE must have 8 or 16 bits a channel, {path} has 32")
    return image
