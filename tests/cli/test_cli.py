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
from image_files import assert_cannot_classify, encoded
from PIL import Image

from mnv2_kernels.cli import demo, memory, pretrained
from mnv2_kernels.cli import main as cli
from mnv2_kernels.network.plan import why_not_on_cpu
from mnv2_kernels.ops.backends import BACKENDS
from mnv2_kernels.ops.extension import cuda_missing
from mnv2_kernels.profiling import verify
from mnv2_kernels.profiling.variants import variants

needs_cpp = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)
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


def test_bench_prints_every_variant(capsys):
    threads = torch.get_num_threads()
    arguments = ["--resolution", "32", "--width", "0.35", "--rounds", "3", "--threads", "1"]
    assert cli.main(["bench", *arguments, "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "MobileNetV2 0.35: batch 2, 32x32, threads: 1" in out and "medians of 3 rounds" in out
    rows = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["plain", "folded", "fused"]
    assert all(float(row[1]) > 0 for row in rows)
    assert torch.get_num_threads() == threads


def spoil(model):
    """Variants of which the fused one gives another first class."""
    copies = variants(model)
    fused = copies["fused"]
    fused.register_forward_hook(lambda module, args, y: y.roll(1, dims=1))
    return copies


def test_bench_does_not_time_wrong_answers(capsys, monkeypatch):
    monkeypatch.setattr(cli, "variants", spoil)
    assert cli.main(["bench", "--resolution", "32", "--width", "0.35"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "the fused network is wrong" in printed.err


def rows_of(text):
    """Cells of the rows of all tables, without their headings."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_memory_in_other_dtypes(dtype, capsys, tmp_path):
    name, file = str(dtype).removeprefix("torch."), tmp_path / "memory.json"
    arguments = ["--resolution", "64", "--width", "0.35", "--dtype", name, "--json", str(file)]
    assert cli.main(["memory", *arguments]) == 0
    out, document = capsys.readouterr().out, json.loads(file.read_text())
    assert f"mobilenet_v2, 1x3x64x64, {name}, threads: " in out and document["dtype"] == name
    reason = why_not_on_cpu(dtype)
    shown = {cells[0]: cells[2] for cells in rows_of(out)[20:]}
    for execution in ("eager", "folded", "fused", "planned"):
        peak = document["executions"][execution]["peak_bytes"]
        left_out = reason is not None and execution in ("fused", "planned")
        assert (shown[execution] == "-") == (peak is None) == left_out
    assert reason is None or f"fused and planned: not measured: {reason}; " in out


@needs_cpp
@pytest.mark.parametrize("model", ["mobilenet_v2", "torchvision:mobilenet_v2"])
def test_memory_computed_and_measured(model, capsys, tmp_path):
    json_file, figure = tmp_path / "memory.json", tmp_path / "memory.png"
    arguments = ["--model", model, "--resolution", "96", "--width", "0.5", "--batch", "2"]
    written = ["--json", str(json_file), "--figure", str(figure)]
    assert cli.main(["memory", *arguments, *written]) == 0
    out = capsys.readouterr().out
    assert f"{model}, 2x3x96x96" in out
    rows = rows_of(out)
    steps, peaks = rows[:20], rows[20:]
    for name, *cells in steps:
        pairs = [re.fullmatch(r"(\d+) / (\d+)", cell).groups() for cell in cells]
        computed, measured = zip(*((int(c), int(m)) for c, m in pairs), strict=True)
        assert all(m >= c for c, m in zip(computed, measured, strict=True)), name
        assert computed[3] == measured[3]
    document = json.loads(json_file.read_text())["executions"]
    assert [row[0] for row in peaks] == list(document) == ["eager", "folded", "fused", "planned"]
    for name, computed, measured, share in peaks:
        peak = document[name]["peak_bytes"]
        assert int(measured.replace(",", "")) == peak
        assert int(computed.replace(",", "")) == document[name]["peak_bytes_computed"] <= peak
        assert share == f"{peak / document['eager']['peak_bytes']:.1%}"
    with Image.open(figure) as image:
        assert image.width > 500


def test_memory_table_of_the_paper(capsys):
    assert cli.main(["memory", "--table"]) == 0
    out = capsys.readouterr().out
    first, current = (rows_of(out)[i : i + 7] for i in (0, 7))
    assert first[0] == ["112x112", "64/1606 | 64/1600", "16/401.4 | 16/400", "48/1204 | 32/800 [1]"]
    assert current[0] == ["112x112"] + ["1/O(1) | 1/O(1)"] * 3
    assert first[-1] == ["max", "1606 | 1600", "401.4 | 400", "1204 | 600 [5]"]
    assert current[-1] == ["max", "802.8 | 800", "150.5 | 200 [2]", "752.6 | 600 [3]"]
    assert re.findall(r"^\[(\d)\] \S", out, re.MULTILINE) == list("12345")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--model", "resnet"], "--model must be mobilenet_v2, torchvision:NAME or timm:NAME"),
        (["--model", "timm:none"], "--model must be a model that timm has, got none"),
        (["--model", "timm:mobilenetv2_050", "--width", "2"], "--width must be left out for timm:"),
        (["--model", "torchvision:alexnet"], "plan: AlexNet cannot be run as a plan: "),
        (["--json", "/nowhere/at/all.json"], "the folder of /nowhere/at/all.json must exist"),
        (["--resolution", "32", "--width", "0.1", "--figure", "memory.xyz"], "--figure must be a"),
    ],
)
@needs_cpp
def test_memory_that_cannot_be_shown(arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["memory", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mnv2 memory: {sentence}") and error.count("\n") == 1


def test_memory_without_compiled_kernels(capsys, monkeypatch):
    monkeypatch.setattr(memory, "missing", "not built")
    assert cli.main(["memory"]) == 2
    assert capsys.readouterr().err == "mnv2 memory: needs the compiled kernels: not built\n"


@pytest.mark.serial
@pytest.mark.parametrize("spoiled", [False, True], ids=["right", "wrong"])
def test_demo(spoiled, tmp_path, capsys, monkeypatch):
    if spoiled:
        monkeypatch.setattr(demo, "variants", spoil)
    assert cli.main(["demo", "--rounds", "3", "--output", str(tmp_path)]) == (1 if spoiled else 0)
    out = capsys.readouterr().out
    assert ("ANSWERS DIFFER" in out) == spoiled == ("(!)" in out)
    for name in ("EfficientNet-Lite0", "MobileNetV2 1.0"):
        assert f"{name}: most probable class" in out and f"{name}: timing" in out
    assert out.count("espresso 0.951") == (1 if spoiled else 2)
    assert str(tmp_path / demo.FIGURE) in out
    with Image.open(tmp_path / demo.FIGURE) as figure:
        assert figure.width > 500 and len(figure.convert("RGB").getcolors(2**20)) > 3


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


def test_interrupt_ends_without_a_traceback(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "backends", interrupted)
    assert cli.main(["info"]) == 130
