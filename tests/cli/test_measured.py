"""`mnv2 bench` and `mnv2 memory`: what they measure of which model, and what they refuse before."""

import json
import re

import cases
import pytest
import torch
from command_line import EXECUTIONS, rows_of, spoil
from PIL import Image

from mnv2_kernels.cli import bench, memory
from mnv2_kernels.cli import main as cli
from mnv2_kernels.network.plan import why_not_on_cpu
from mnv2_kernels.profiling import memory_report

needs_cpp = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)
SMALL = ["--resolution", "32", "--rounds", "3", "--threads", "1"]
OWN_MODEL = """
from torch import nn
from mnv2_kernels import InvertedResidual

def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), InvertedResidual(8, 8), nn.Tanh())

def half():
    return net().bfloat16()

class Pairs(nn.Conv2d):
    def forward(self, x):
        return super().forward(x), x

pairs = Pairs(1, 1, 1)
"""


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """A module `own_models` in the current folder."""
    (tmp_path / "own_models.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_bench_prints_every_execution(capsys, tmp_path):
    threads, path = torch.get_num_threads(), tmp_path / "bench.json"
    arguments = [*SMALL, "--width", "0.35", "--batch", "2", "--json", str(path)]
    assert cli.main(["bench", *arguments]) == 0
    printed = capsys.readouterr()
    out, document = printed.out, json.loads(path.read_text())
    assert "mobilenet_v2: 2x3x32x32, threads: 1" in out and "medians of 3 rounds" in out
    rows = rows_of(out)
    assert tuple(row[0] for row in rows) == EXECUTIONS == tuple(document["executions"])
    for name, milliseconds, eager, folded, *_, peak in rows:
        found = document["executions"][name]
        assert float(milliseconds) == pytest.approx(1e3 * found["seconds"], abs=0.006)
        assert (eager, folded) == tuple(f"{found[f'over_{o}']:.2f}x" for o in ("eager", "folded"))
        assert peak == f"{found['peak_bytes'] / 2**20:.2f}" and len(found["samples"]) == 3
    assert document["threads"] == 1 and document["x_shape"] == [2, 3, 32, 32]
    assert document["why_no_plan"] is None
    assert out.splitlines()[-2:] == [document["verdict"], f"wrote {path}"]
    assert f"{document['blocks_fused']} of 17 blocks are fused.\n" in out
    assert torch.get_num_threads() == threads and printed.err.count("\n") <= 1


def test_bench_of_a_model_without_a_plan(capsys, own_models):
    arguments = ["--model", "own_models:net", "--input-shape", "1,20,24", *SMALL]
    assert cli.main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    assert "own_models:net: 1x1x20x24, threads: 1" in out
    assert tuple(row[0] for row in rows_of(out)) == EXECUTIONS[:3]
    assert "No plan: Sequential cannot be run as a plan: tanh is not supported, in 2" in out
    assert re.search(r"fused is .*x as fast as eager and .* of eager's memory\.$", out)


def test_bench_does_not_time_wrong_answers(capsys, monkeypatch):
    monkeypatch.setattr(bench, "variants", spoil)
    assert cli.main(["bench", "--resolution", "32", "--width", "0.35"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "fused is wrong, not timed" in printed.err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--threads", "999"], r"--threads must be at most \d+, got 999"),
        (["--json", "/nowhere/b.json"], "--json must be a file in a folder that exists, got /now"),
        (["--input-shape", "3,224"], "--input-shape must be C,H,W, got 3,224"),
        (["--input-shape", "3,0,224"], r"--input-shape: input_shape must be \(C, H, W\)"),
        (["--input-shape", "4,32,32"], r"--model must take images of --input-shape \(4, 32, 32\)"),
        (
            ["--model", "own_models:pairs", "--input-shape", "1,4,4"],
            "--model must return a tensor, own_models:pairs returns a tuple",
        ),
        (
            ["--model", "own_models:half", "--input-shape", "1,8,8"],
            r"--model must take images of --input-shape \(1, 8, 8\), own_models:half says: ",
        ),
        (["--resolution", "2000000"], r"images of \(1, 3, 2000000, 2000000\) must fit the memory"),
        (["--json", "b.json", "--peers"], "--json must be left out where --peers is given"),
    ],
)
def test_bench_that_cannot_be_done(arguments, sentence, capsys, monkeypatch, own_models):
    """Before anything is timed."""
    monkeypatch.setattr(bench, "compare", None)
    assert cli.main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert re.match(f"mnv2 bench: {sentence}", printed.err) and printed.err.count("\n") == 1
    assert printed.out == ""


@needs_cpp
def test_memory_of_a_model_without_a_plan(capsys, own_models, tmp_path):
    path = tmp_path / "memory.json"
    arguments = ["--model", "own_models:net", "--input-shape", "1,40,48", "--json", str(path)]
    assert cli.main(["memory", *arguments]) == 0
    out, document = capsys.readouterr().out, json.loads(path.read_text())
    assert "No plan: Sequential cannot be run as a plan: tanh is not supported" in out
    peaks = {name: int(peak.replace(",", "")) for name, peak, _ in rows_of(out)}
    assert tuple(peaks) == EXECUTIONS[:3]
    assert peaks == {name: f["peak_bytes"] for name, f in document["executions"].items()}
    assert peaks["fused"] < peaks["eager"] and f"wrote {path}" in out
    # The input, the result and one tensor of 8 channels of a quarter at least.
    assert min(peaks.values()) >= 4 * (40 * 48 + 8 * 20 * 24)
    assert cli.main(["memory", *arguments, "--figure", "memory.png"]) == 2
    assert "--figure must be left out for own_models:net: Sequential" in capsys.readouterr().err


@needs_cpp
def test_memory_of_a_training_step(capsys, tmp_path):
    path = tmp_path / "memory.json"
    arguments = ["--resolution", "64", "--batch", "8", "--train", "--json", str(path)]
    assert cli.main(["memory", *arguments]) == 0
    peaks = {name: int(peak.replace(",", "")) for name, peak, _ in rows_of(capsys.readouterr().out)}
    found = json.loads(path.read_text())["executions"]
    assert peaks == {name: f["peak_bytes"] for name, f in found.items()}
    assert tuple(peaks) == ("eager", "checkpointed", "fused")
    assert peaks["fused"] < peaks["checkpointed"] < peaks["eager"]
    assert cli.main(["memory", *arguments, "--figure", "memory.png"]) == 2
    assert "--figure must be left out where --train is given" in capsys.readouterr().err


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
    assert f"{model}, 2x3x96x96" in out and f"wrote {json_file}" in out and f"wrote {figure}" in out
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
        (["--model", "resnet"], "--model must be mobilenet_v2, torchvision:NAME, timm:NAME or "),
        (["--json", "/nowhere/at/all.json"], "--json must be a file in a folder that exists, got"),
        (["--json", "/"], "--json must be a file in a folder that exists, got /"),
        (["--figure", "memory.xyz"], "--figure must end in one of ."),
        (["--table", "--json", "a.json"], "--json and --figure must be left out where --table is"),
    ],
)
@needs_cpp
def test_memory_that_cannot_be_shown(arguments, sentence, capsys, monkeypatch, tmp_path):
    """Before anything is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory_report, "measure", None)
    assert cli.main(["memory", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mnv2 memory: {sentence}") and error.count("\n") == 1


def test_memory_without_compiled_kernels(capsys, monkeypatch):
    monkeypatch.setattr(memory, "missing", "not built")
    assert cli.main(["memory"]) == 2
    assert capsys.readouterr().err == "mnv2 memory: needs the compiled kernels: not built\n"
