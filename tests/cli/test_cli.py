"""The command line: what it prints, its exit status, and hostile image files."""

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from functools import cache

import cases
import pytest
import torch
from command_line import EXECUTIONS, rows_of, spoil
from image_files import assert_cannot_classify, encoded
from PIL import Image

from mnv2_kernels.cli import demo, pretrained
from mnv2_kernels.cli import main as cli
from mnv2_kernels.network.figures import draw
from mnv2_kernels.ops.backends import BACKENDS
from mnv2_kernels.ops.extension import cuda_missing
from mnv2_kernels.profiling import verify

pytestmark = pytest.mark.sampled(2)

needs_kernel = pytest.mark.skipif(not cases.kernel_backends(), reason="no kernel in this run")


@cache
def coffee() -> Image.Image:
    return pretrained.photograph("coffee")


def huge_png() -> bytes:
    """A valid PNG of 60000 x 60000 pixels, in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_info_as_a_program():
    """Run as a user does, where nothing has declared torchvision's operators."""
    done = subprocess.run(
        [sys.executable, "-m", "mnv2_kernels", "info"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert rows["torch"] == torch.__version__
    assert int(rows["threads"]) >= 1 and rows["cpu"]
    assert {f"backend {b.name}" for b in BACKENDS} <= set(rows)
    if cases.kernel_backends():
        assert rows["build torch"] == torch.__version__.split("+")[0]


def test_classify_as_a_program():
    path = pretrained.package_file(*pretrained.PHOTOGRAPHS["coffee"])
    done = subprocess.run(
        [sys.executable, "-m", "mnv2_kernels", "classify", path], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "0.951  espresso" and len(lines) == 5


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "be a complete"),
        (b"not an image", "be a complete"),
        (lambda: encoded(coffee(), "PNG")[:20000], "be a complete"),
        (lambda: encoded(coffee(), "PNG")[:40], "be a complete"),
        (lambda: encoded(coffee(), "JPEG")[:5000], "be a complete"),
        (lambda: encoded(coffee(), "TIFF")[:5000], "be a complete"),
        (lambda: encoded(coffee(), "GIF")[:5000], "be a complete"),
        (lambda: encoded(coffee(), "EPS"), "be a complete .* cannot identify image"),
        (huge_png, "have at most 89478485 pixels"),
    ],
    ids=["empty", "text", "png", "png-header", "jpeg", "tiff", "gif", "postscript", "huge"],
)
def test_classify_hostile_file(content, sentence, tmp_path, capsys):
    path = tmp_path / "image"
    path.write_bytes(content if isinstance(content, bytes) else content())
    assert_cannot_classify(path, sentence, capsys)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "unreadable"])
def test_classify_what_is_not_a_file(kind, tmp_path, capsys, monkeypatch):
    path = tmp_path / kind
    sentence = {"missing": "does not exist", "unreadable": "ermission denied"}.get(kind, "is not a")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "unreadable":
        path.write_bytes(encoded(coffee(), "PNG"))

        def denied(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Image, "open", denied)
    assert_cannot_classify(path, sentence, capsys)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded(coffee().rotate(90, expand=True), "JPEG", exif=exif, quality=95)


@pytest.mark.parametrize(
    "content",
    [
        lambda: encoded(coffee().convert("CMYK"), "JPEG"),
        lambda: encoded(coffee().convert("P"), "GIF"),
        lambda: encoded(coffee().convert("RGBA"), "WEBP"),
        rotated,
    ],
    ids=["cmyk", "palette", "alpha", "rotated"],
)
def test_classify_unusual_encodings(content, tmp_path, capsys):
    path = tmp_path / "image"
    path.write_bytes(content())
    assert cli.main(["classify", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("  espresso")


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5000, 2)])
@pytest.mark.parametrize("mode", ["1", "L", "I;16"])
def test_classify_unusual_sizes(size, mode, tmp_path, capsys):
    path = tmp_path / "image.png"
    Image.new(mode, size).save(path)
    assert cli.main(["classify", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_missing_packages_and_other_weights_end_in_a_sentence(tmp_path, capsys, monkeypatch):
    find_spec = pretrained.util.find_spec
    monkeypatch.setattr(
        pretrained.util, "find_spec", lambda name: None if name == "skimage" else find_spec(name)
    )
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "mnv2 demo: needs skimage, not installed here: pip install scikit-image\n"
    )
    monkeypatch.undo()
    monkeypatch.setattr(pretrained, "LITE0_SHA256", "0" * 64)
    path = pretrained.package_file(*pretrained.PHOTOGRAPHS["coffee"])
    assert cli.main(["classify", str(path)]) == 2
    assert re.search(r"\.pth: sha256 must be 0{64}, got 5793\w{60}\n$", capsys.readouterr().err)


@needs_kernel
def test_verify_passes(capsys):
    assert cli.main(["verify"]) == 0
    out = capsys.readouterr().out
    # On a GPU in three dtypes too.
    on_gpu = 1 + (cuda_missing is None) if torch.cuda.is_available() else 0
    runs = len(cases.kernel_backends()) + 3 * on_gpu
    assert f"{24 * runs} of {24 * runs} right" in out
    assert out.count("32x192x32-s1-k3") == 2 * runs


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: y.nan_to_num().mul(1.0001),
        lambda y: y.clone().index_fill_(3, torch.tensor([y.shape[3] - 1]), 0.0),
        lambda y: torch.full_like(y, torch.nan),
        lambda y: y[:, :-1],
    ],
    ids=["scaled", "column-lost", "nan", "channel-lost"],
)
def test_verify_notices_a_wrong_kernel(wrong, capsys, monkeypatch):
    right = verify.inverted_residual
    monkeypatch.setattr(verify, "ODD_SHAPES", verify.ODD_SHAPES[:1])
    monkeypatch.setattr(verify, "mobilenet_v2_block_inputs", lambda: [])
    monkeypatch.setattr(verify, "kernels", lambda *check: (["reference"], []))
    assert cli.main(["verify"]) == 0
    monkeypatch.setattr(verify, "inverted_residual", lambda *args, **kw: wrong(right(*args, **kw)))
    assert cli.main(["verify"]) == 1
    assert "0 of 1 right" in capsys.readouterr().out


def test_verify_in_half_precision(monkeypatch):
    """As on a GPU, whose kernel Triton's interpreter runs here."""
    monkeypatch.setattr(verify, "mobilenet_v2_block_inputs", lambda: [])
    results = list(verify.verify(["triton"], dtype=torch.float16))
    assert len(results) == len(verify.ODD_SHAPES)
    assert {(r.backend, r.dtype, r.wrong) for r in results} == {("triton", "float16", None)}


def test_verify_without_a_kernel_is_not_green(capsys, monkeypatch):
    monkeypatch.setattr(verify, "kernels", lambda *check: ([], ["cpu: not built"]))
    assert cli.main(["verify"]) == 2
    assert capsys.readouterr().err == "mnv2 verify: no kernel runs here: cpu: not built\n"


@pytest.mark.serial
@pytest.mark.parametrize("spoiled", [False, True], ids=["right", "wrong"])
def test_demo(spoiled, tmp_path, capsys, monkeypatch):
    if spoiled:
        monkeypatch.setattr(demo, "variants", spoil)
    drawn = []
    monkeypatch.setattr(
        demo, "draw", lambda panels, path: drawn.extend(panels) or draw(panels, path)
    )
    assert cli.main(["demo", "--rounds", "3", "--output", str(tmp_path)]) == (1 if spoiled else 0)
    printed = capsys.readouterr()
    out = printed.out
    assert ("ANSWERS DIFFER" in out) == spoiled == ("(!)" in out)
    assert printed.err == ""
    names = ["EfficientNet-Lite0", "MobileNetV2 1.0"]
    for name in names:
        assert f"{name}: most probable class" in out and f"{name}: 1x3x" in out
    assert out.count("espresso 0.951") == (1 if spoiled else 2)
    assert "19 breeds of dogs and nothing else" in out
    assert str(tmp_path / demo.FIGURE) in out
    with Image.open(tmp_path / demo.FIGURE) as figure:
        assert figure.width > 500 and len(figure.convert("RGB").getcolors(2**20)) > 3
    # The table has the peaks of the figure, of all four executions.
    assert [panel.title for panel in drawn] == names
    peaks = [cells[-1] for cells in rows_of(out) if cells[0] in EXECUTIONS]
    expected = [max(held) for panel in drawn for _, held in panel.timelines.values()]
    assert peaks == [f"{peak / 2**20:.2f}" for peak in expected] and len(peaks) == 8
    assert [set(panel.timelines) for panel in drawn] == [set(EXECUTIONS)] * 2
    # It ends with a sentence a network.
    for name, line in zip(names, out.splitlines()[-2:], strict=True):
        assert re.match(f"{name}: .*(planned|fused) is .* as fast as eager", line)


def test_demo_refuses_a_folder_it_cannot_write_to(tmp_path, capsys):
    folder = tmp_path / "none"
    assert cli.main(["demo", "--output", str(folder)]) == 2
    expected = f"mnv2 demo: --output must be a folder that can be written to, got {folder}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "required: COMMAND"),
        (["classify"], "required: IMAGE"),
        (["bench", "--batch", "0"], "--batch: must be above 0, got 0"),
        (["bench", "--width", "nan"], "--width: must be above 0, got nan"),
        (["memory", "--resolution", "x"], "--resolution: invalid int value: 'x'"),
    ],
)
def test_wrong_arguments(arguments, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_for_terminals(terminal, capsys, monkeypatch):
    """On stderr, with what is done; results on stdout are the same."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(verify, "kernels", lambda *check: (["reference"], []))
    monkeypatch.setattr(verify, "mobilenet_v2_block_inputs", lambda: [])
    assert cli.main(["verify"]) == 0
    printed = capsys.readouterr()
    assert ("verifying the kernels" in printed.err) == terminal == bool(printed.err)
    assert "verifying" not in printed.out and printed.out.endswith("7 of 7 right\n")


def test_info_as_json(tmp_path, capsys):
    path = tmp_path / "info.json"
    assert cli.main(["info", "--json", str(path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    facts = json.loads(path.read_text())
    assert last == f"wrote {path}" and [line.split("  ")[0] for line in lines] == list(facts)
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()


def test_interrupt_ends_without_a_traceback(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "backends", interrupted)
    assert cli.main(["info"]) == 130
