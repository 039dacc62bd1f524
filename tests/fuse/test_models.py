"""Whole models of other libraries after `fuse`: the table docs/models.md, checked and written.

Every model is fused and must give the same answers; the other columns are checked for a few models
here and for all of them by `make models`, which writes the table.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import model_checks as checks
import pytest
import torch
from model_zoo import MODELS, images
from torch import nn

import mnv2_kernels as mk
from benchmarks import markdown
from mnv2_kernels.modules.fused_module import FusedModule

pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
README = TABLE.parent.parent / "README.md"
WRITES = os.environ.get("MNV2_MODELS") == "write"
# Small ones.
THOROUGH = ("torchvision mobilenet_v2, a block reused", "a MobileNetV1 as nn.Sequential")
HEADING = (
    "model",
    "fused",
    "declined",
    "other_depthwise",
    "same_output",
    "compile",
    "export",
    "train_step",
)


@dataclass(frozen=True)
class Case:
    """A model in float64 whose activations use both clips, the same one fused, and images."""

    plain: nn.Module
    fused: nn.Module
    x: torch.Tensor

    def single(self) -> "Case":
        """The same in float32, where the fused blocks run on what they choose."""
        plain = copy.deepcopy(self.plain).float()
        return Case(plain, mk.fuse(plain), self.x.float())


# Of the module, so that all tests of a model follow one another.
@pytest.fixture(scope="module")
def case(request) -> Case:
    model = MODELS[request.param]
    torch.manual_seed(0)
    plain = checks.enliven(model.build().double(), images(model, torch.float64, batch=4))
    return Case(plain, mk.fuse(plain, backend="reference"), images(model, torch.float64))


class Table(dict[str, dict[str, str]]):
    """name -> cells of the models that were checked; `make models` writes each as it is complete.

    A run of some of the models leaves the rows of the others as they are.
    """

    def begin(self, name: str) -> None:
        self[name] = {"model": name}

    def note(self, name: str, **cells: str) -> None:
        row = self.setdefault(name, {"model": name})
        row.update(cells)
        complete = {n: self[n] for n in MODELS if self.get(n, {}).keys() == set(HEADING)}
        if WRITES and name in complete:
            TABLE.parent.mkdir(exist_ok=True)
            TABLE.write_text(render(complete))
            README.write_text(markdown.fill(README.read_text(), {"models": summary(complete)}))


@pytest.fixture(scope="session")
def table() -> Table:
    return Table(committed_rows() if WRITES and TABLE.exists() else {})


def summary(rows: dict[str, dict[str, str]]) -> str:
    """What the README says of the table: models, recognised and declined blocks by library."""
    lines = ["| library | models | fused blocks | declined blocks | same output | train step |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    libraries = dict.fromkeys(name.split(" ")[0] for name in rows)
    for library in libraries:
        own = [row for name, row in rows.items() if name.split(" ")[0] == library]
        declined = [part.split(": ")[0] for row in own for part in row["declined"].split("; ")]
        cells = (
            {"a": "nn.Sequential", "smp": "segmentation_models_pytorch"}.get(library, library),
            len(own),
            sum(int(row["fused"]) for row in own),
            sum(int(number) for number in declined if number != "-"),
            *(sum(row[way] == "yes" for row in own) for way in ("same_output", "train_step")),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def render(rows: dict[str, dict[str, str]]) -> str:
    fused = sum(int(row["fused"]) for row in rows.values())
    lines = [
        "# Models",
        "",
        f"{len(rows)} models are tested whole; {fused} blocks of them run in one pass. No model",
        "needs support by name: `fuse` reads what the forward of a module computes",
        "([recognizers.md](recognizers.md)), so a model that is not in this table is treated in",
        "the same way. `print(mk.explain(model))` gives its row, block by block.",
        "",
        "`make models` checks all of this and writes this page. Weights are random and scaled so",
        "that both clips of every block act.",
        "",
        "- **fused**: blocks that `mk.fuse` replaces.",
        "- **declined**: blocks that keep their layers, how many and why.",
        "- **other depthwise**: depthwise convolutions in neither.",
        "- **same output**: within rounding, in float32 and in float64.",
        "- **compile**: `torch.compile` takes the fused model as one graph.",
        "- **export**: `torch.export` takes it.",
        "- **train step**: the same parameters and statistics after a step, within rounding.",
        "- *the plain model neither*: the original cannot be compiled or exported.",
        "",
        "Convolutions that are in no block are in no column, such as stems and the first stage of",
        "EfficientNetV2. They run as they are.",
        "",
        "| " + " | ".join(HEADING).replace("_", " ") + " |",
        "| --- | ---: | --- | ---: | --- | --- | --- | --- |",
        *("| " + " | ".join(row[name] for name in HEADING) + " |" for row in rows.values()),
    ]
    return "\n".join(lines) + "\n"


def count_cells(counts: checks.Counts) -> dict[str, str]:
    declined = "; ".join(f"{number}: {reason}" for reason, number in counts.declined)
    return {
        "fused": str(counts.fused),
        "declined": declined.replace("|", "\\|") or "-",
        "other_depthwise": str(counts.others),
    }


def committed_rows() -> dict[str, dict[str, str]]:
    """The rows of the table as it is."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in lines[2:]]
    return {row[0]: dict(zip(HEADING, row, strict=True)) for row in cells}


every_model = pytest.mark.parametrize("case", MODELS, indirect=True)
some_models = pytest.mark.parametrize("case", MODELS if WRITES else THOROUGH, indirect=True)


@every_model
def test_fused_model_gives_the_same_answers(case, request, table):
    name = request.node.callspec.params["case"]
    counts = checks.count(case.plain)
    table.begin(name)
    table.note(name, **count_cells(counts))
    if not WRITES:
        row = committed_rows()[name]
        assert {key: row[key] for key in count_cells(counts)} == count_cells(counts)
    states = [row.state for row in mk.explain(case.fused) if row.state != "declined"]
    assert states == ["fused"] * counts.fused
    assert list(case.fused.state_dict()) == list(case.plain.state_dict())
    assert checks.error(case.fused, case.plain, case.x) < (1e-9 if counts.fused else 1e-300)
    assert checks.idle_clips(case.plain, images(MODELS[name], torch.float64, batch=6)) == []


@some_models
def test_fused_kernels_are_as_exact_as_the_layers(case, request, table):
    single = case.single()
    with torch.no_grad():
        truth = case.plain(case.x)
        error = checks.largest_error(single.fused(single.x), truth)
        plain_error = checks.largest_error(single.plain(single.x), truth)
    assert error <= 4 * plain_error + 1e-5
    table.note(request.node.callspec.params["case"], same_output="yes")


@pytest.mark.skipif(WRITES, reason="writes the pages")
def test_pages_are_what_make_models_writes():
    rows = committed_rows()
    assert list(rows) == list(MODELS)
    assert TABLE.read_text() == render(rows)
    readme = README.read_text()
    assert readme == markdown.fill(readme, {"models": summary(rows)})


@some_models
@pytest.mark.parametrize("way", ["compile", "export"])
def test_fused_model_goes_the_way_of_the_plain_one(case, way, request, table):
    check = {"compile": checks.compiles, "export": checks.exports}[way]
    single, cell = case.single(), "yes"
    if checks.count(case.plain).fused == 0:
        cell = "nothing fused"
    elif not goes(check, single.fused, single.x):
        assert not goes(check, single.plain, single.x)
        cell = "the plain model neither"
    table.note(request.node.callspec.params["case"], **{way: cell})


def goes(check, model: nn.Module, x: torch.Tensor) -> bool:
    """Whether a model can be compiled or exported; what comes out must be right."""
    try:
        error = check(model, x)
    except Exception as reason:
        print(f"{type(reason).__name__}: {reason}")
        return False
    assert error < 1e-3
    return True


@some_models
def test_train_step_is_that_of_the_plain_model(case, request, table):
    single = case.single()
    expected = checks.train_step(single.plain, single.x)
    found = checks.train_step(single.fused, single.x)
    moved = 0.0
    for (name, before), ours, theirs in zip(
        single.plain.state_dict().items(), found, expected, strict=True
    ):
        step = (theirs.double() - before.double()).norm()
        error = (ours.double() - theirs.double()).norm()
        assert error <= 0.1 * step + 1e-5 * theirs.double().norm() + 1e-7, name
        moved += float(step)
    assert moved > 0
    table.note(request.node.callspec.params["case"], train_step="yes")


def test_table_has_every_model():
    rows = committed_rows()
    assert list(rows) == list(MODELS)
    assert summary(rows) in README.read_text()
    assert all(row["same_output"] == row["train_step"] == "yes" for row in rows.values())
    assert len(MODELS) >= 40


def test_unfused_models_are_what_they_were():
    for name in THOROUGH:
        model = MODELS[name].build().eval()
        plain = mk.unfuse(mk.fuse(model))
        assert not any(isinstance(m, FusedModule) for m in plain.modules())
        assert str(plain) == str(model)
