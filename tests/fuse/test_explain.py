"""What `explain` tells of a model: rows, reasons, sizes, and a summary to act on."""

import copy
import html
import pickle
import re

import pytest
import torch
import torchvision
from foreign_blocks import Flat, flow
from same_answers import randomise
from torch import nn
from torchvision.models.efficientnet import MBConv, MBConvConfig
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk
from mnv2_kernels.ops.extension import missing

pytestmark = pytest.mark.usefixtures("one_thread")


def mobilenet(width=0.35):
    return randomise(torchvision.models.mobilenet_v2(width_mult=width, num_classes=10))


def test_explain_states():
    model = nn.ModuleDict(
        {
            "fusable": TorchvisionBlock(8, 8, 1, 6),
            "declined": Flat(flow(act=nn.Mish), True),
            "other": nn.Conv2d(8, 8, 1),
            "fused": mk.fuse(TorchvisionBlock(8, 16, 2, 6), backend="reference"),
            "plain": mk.InvertedResidual(8, 8, backend="reference"),
        }
    ).eval()
    model["plain"].train()
    before = copy.deepcopy(dict(model.named_modules())).keys()
    report = mk.explain(model)
    assert {row.name: row.state for row in report} == {
        "fusable": "fusable",
        "declined": "declined",
        "fused": "fused",
        "plain": "plain",
    }
    rows = {row.name: row for row in report}
    assert rows["fused"].config.name == "8x48x16-s2-k3"
    assert (rows["fused"].backend, rows["fused"].reason) == ("reference", None)
    assert rows["plain"].backend is None
    assert "training mode" in rows["plain"].reason
    assert "(Mish)" in rows["declined"].reason
    assert list(dict(model.named_modules())) == list(before)
    lines = str(report).splitlines()
    assert lines[1].startswith("fusable   fusable   8x48x8-s1-k3 residual")
    notes = [f"[1] 1 block: {rows['declined'].reason}", f"[2] 1 block: {rows['plain'].reason}"]
    assert lines[1 + len(report) :] == [*notes, report.summary]
    assert lines[2].endswith(" [1]") and lines[4].endswith(" [2]")
    assert report.summary.startswith("1 of 4 blocks run fused, 1 more can: `fuse(model)`. ")


@pytest.mark.parametrize("fused", [False, True], ids=["original", "fused"])
def test_explain_counts_the_bytes_of_one_image(fused):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), TorchvisionBlock(8, 16, 2, 6)).eval()
    model.append(TorchvisionBlock(16, 16, 1, 1))
    if fused:
        model = mk.fuse(model, backend="reference")
    calls = []
    model[0].register_forward_hook(lambda *args: calls.append(args[1][0].device.type))
    first, second = mk.explain(model.train(), input_shape=(5, 3, 40, 24))
    # 8x20x12 is expanded to 48 channels, then halved; the second block has no expansion.
    assert first.input_hw == (20, 12)
    assert first.bytes_saved == 4 * 48 * (20 * 12 + 10 * 6)
    assert second.bytes_saved == 4 * 16 * 10 * 6
    assert mk.explain(model, input_shape=(1, 3, 40, 24)).bytes_saved == (
        first.bytes_saved + second.bytes_saved
    )
    assert set(calls) == {"meta"}
    assert all(m.training for m in model.modules())
    half = copy.deepcopy(model).half()
    assert mk.explain(half, input_shape=(1, 3, 40, 24))[1].bytes_saved == second.bytes_saved / 2


def test_a_squeeze_excite_saves_the_expansion_alone():
    """The depthwise result of an image is kept until its gate is known."""
    block = MBConv(MBConvConfig(6, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d).eval()
    (row,) = mk.explain(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), block), input_shape=(1, 3, 40, 24))
    assert row.config.squeeze_channels == 2
    assert row.bytes_saved == 4 * 48 * 20 * 12


def test_explain_of_a_model_without_blocks():
    said = "No inverted residual block was found, so `fuse` changes nothing."
    assert str(mk.explain(nn.ReLU())) == said and said in mk.explain(nn.ReLU())._repr_html_()


def test_explain_says_an_equal_reason_once():
    model = nn.Sequential(*(Flat(flow(act=nn.Mish), True) for _ in range(3))).eval()
    *table, note, summary = str(mk.explain(model)).splitlines()
    assert [line.endswith(" [1]") for line in table] == [False, True, True, True]
    assert note == "[1] 3 blocks: mish is not supported, in conv.2 (Mish)"
    assert summary == "0 of 3 blocks can run fused, so `fuse` changes nothing."


def test_explain_in_a_notebook():
    """The cells are those of the text."""
    report = mk.explain(nn.Sequential(mk.InvertedResidual(8, 8), Flat(flow(act=nn.Mish), True)))
    page = report._repr_html_()
    rows = re.findall("<tr>(.*?)</tr>", page)
    assert len(rows) == 1 + len(report)
    for row, line in zip(rows, str(report).splitlines(), strict=False):
        assert re.findall("<t[hd]>([^<]+)</t[hd]>", row) == re.split(" {2,}", line)
    assert html.escape(report.summary) in page and "mish is not supported" in page


def test_explain_says_what_plan_would_say():
    """Also where hooks of the model itself would not be called by a plan, but by the model are."""
    for add in (
        lambda model: None,
        lambda model: model.register_forward_hook(lambda module, args, y: 2 * y),
        lambda model: model.features[2].register_forward_hook(lambda module, args, y: 2 * y),
    ):
        fused = mk.fuse(mobilenet())
        add(fused)
        for report in (mk.explain(fused), mk.explain(fused, input_shape=(3, 64, 64))):
            assert (report.why_no_plan is None) == ("The model has a plan" in str(report))
            assert (report.why_no_plan is None) != ("model and x are channels_last" in str(report))
            if report.why_no_plan is None:
                mk.plan(fused, (3, 64, 64))
                continue
            with pytest.raises(ValueError, match=re.escape(report.why_no_plan)):
                mk.plan(fused, (3, 64, 64))
            assert f"The model has no plan: {report.why_no_plan}." in str(report)


@pytest.mark.parametrize("shape", [(3, 40, 24), [5, 3, 40, 24], torch.Size((1, 3, 40, 24))])
def test_explain_takes_the_shapes_that_plan_takes(shape):
    model = mobilenet()
    expected = [row.input_hw for row in mk.explain(model, input_shape=(1, 3, 40, 24))]
    assert [row.input_hw for row in mk.explain(model, input_shape=shape)] == expected
    assert expected[0] == (20, 12)


@pytest.mark.parametrize("shape", [224, "224", (3,), (3, 0, 64), (3, 64.0, 64), (3, 2**31, 8)])
def test_explain_says_of_wrong_shapes_what_plan_says(shape):
    said = []
    for function in (mk.explain, mk.plan):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(mobilenet(), input_shape=shape)
        said.append((type(caught.value), str(caught.value).removeprefix(f"{function.__name__}: ")))
    assert said[0] == said[1]


def test_explain_of_an_image_that_the_model_does_not_take():
    said = r"^explain: input_shape must be one that the model takes, got \(4, 32, 32\): "
    with pytest.raises(ValueError, match=said):
        mk.explain(mobilenet(), input_shape=(4, 32, 32))


def test_report_is_data():
    report = mk.explain(mobilenet(), input_shape=(1, 3, 32, 32))
    again = pickle.loads(pickle.dumps(report))
    assert again == report
    assert again.bytes_saved == report.bytes_saved > 0


@pytest.mark.skipif(missing is not None, reason="without the extension a plan runs its steps")
def test_a_dtype_that_no_plan_has_on_a_cpu():
    model = mobilenet().double()
    reason = mk.explain(model).why_no_plan
    with pytest.raises(TypeError) as error:
        mk.plan(model, (3, 64, 64))
    assert reason is not None and reason in str(error.value)
