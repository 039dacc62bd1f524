"""`--model`: what it takes, what it says of names that there are not, and `mnv2 explain`."""

import re

import pytest
import torch

import mnv2_kernels as mk
from mnv2_kernels.cli import main as cli
from mnv2_kernels.cli.named_models import UnknownModel, named_model

OWN = """
from torch import nn
from mnv2_kernels import InvertedResidual

def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), InvertedResidual(8, 8), nn.Tanh()).train()

module = net()

def wrong():
    raise OSError("no weights here")

number = lambda: 5
"""


@pytest.fixture(autouse=True)
def users_models(tmp_path, monkeypatch):
    """Modules `users_models` and `broken` in the current folder."""
    (tmp_path / "users_models.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    "name, kind",
    [
        ("mobilenet_v2", "MobileNetV2"),
        ("torchvision:mnasnet0_5", "MNASNet"),
        ("timm:mobilenetv2_050", "EfficientNet"),
        ("timm:mobilenetv2_050.lamb_in1k", "EfficientNet"),
        ("users_models:net", "Sequential"),
        ("users_models:module", "Sequential"),
        ("torch.nn:ReLU", "ReLU"),
    ],
)
def test_names(name, kind):
    model = named_model(name)
    assert type(model).__name__ == kind and not any(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["mobilenet_v2", "torchvision:mobilenet_v2"])
def test_widths(name):
    weights = [sum(p.numel() for p in named_model(name, w).parameters()) for w in (0.5, None, 1.0)]
    assert weights[0] < weights[1] == weights[2]


@pytest.mark.parametrize(
    "name, sentence",
    [
        (
            "resnet18",
            r"or MODULE:FUNCTION, got resnet18: did you mean torchvision:resnet18 or ",
        ),
        ("timm/mobilenetv2_100", r"got timm/mobilenetv2_100: did you mean timm:mobilenetv2_100\?"),
        ("mobilenetv2", r"got mobilenetv2: did you mean .*mobilenet_v2"),
        (
            "timm:mobilnetv2_100",
            r"a model that timm has, got mobilnetv2_100: .* timm:mobilenetv2_100",
        ),
        ("torchvision:resnet_18", r"has, got resnet_18: did you mean torchvision:resnet18"),
        ("timm:zzzzzzzz", r"a model that timm has, got zzzzzzzz$"),
        ("", r"MODULE:FUNCTION, got$"),
        ("nowhere:net", r"got nowhere:net; importing nowhere: No module named 'nowhere'"),
        ("broken:net", r"importing broken: No module named 'nothing_of_that_name'"),
        ("users_models:nett", r"users_models has no nett: did you mean net"),
        ("users_models:wrong", r"got users_models:wrong; calling it: no weights here"),
        ("users_models:number", r"it must give a module, got int"),
    ],
)
def test_names_that_there_are_not(name, sentence, capsys):
    assert cli.main(["explain", "--model", name]) == 2
    error = capsys.readouterr().err
    assert re.search(f"^mnv2 explain: --model must be .*{sentence}", error.strip()), error
    assert error.count("\n") == 1


NARROWER = ["timm:mobilenetv2_050", "users_models:net", "torchvision:resnet18"]


@pytest.mark.parametrize("name", NARROWER)
def test_widths_of_names_that_say_it_themselves(name):
    with pytest.raises(UnknownModel, match=f"^--width must be left out for {name}, got 2"):
        named_model(name, 2.0)


def test_explain_prints_the_report(capsys):
    torch.manual_seed(0)
    assert cli.main(["explain", "--model", "users_models:net", "--input-shape", "1, 20,24"]) == 0
    out = capsys.readouterr().out
    assert out == f"{mk.explain(named_model('users_models:net'), input_shape=(1, 20, 24))}\n"
    assert "10x12" in out and "tanh is not supported" in out
    assert cli.main(["explain", "--model", "users_models:net"]) == 2
    said = "mnv2 explain: input_shape must be one that the model takes, got (3, 224, 224)"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("name, rows", [("users_models:net", ["fused"]), ("mobilenet_v2", None)])
def test_verify_of_a_model(name, rows, capsys):
    """The whole of it, fused and as a plan where it has one."""
    shape = "1,20,24" if rows else "3,32,32"
    assert cli.main(["verify", "--model", name, "--input-shape", shape]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("│")]
    expected = rows or ["fused", "planned"]
    assert [line.split("│")[4].strip() for line in lines] == expected
    assert out.endswith(f"{len(expected)} of {len(expected)} right\n")


@pytest.mark.parametrize(
    "option", [["--width", "0.5"], ["--batch", "2"], ["--input-shape", "3,8,8"]]
)
def test_verify_of_the_kernels_takes_no_sizes(option, capsys):
    assert cli.main(["verify", *option]) == 2
    said = "mnv2 verify: --width, --batch, --resolution and --input-shape need a --model\n"
    assert capsys.readouterr().err == said
