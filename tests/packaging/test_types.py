"""The types of an installed package, as a user's checker sees them."""

from importlib import util
from pathlib import Path

import pytest
from builds import ROOT, SKIP, build, clean_environment, copy_tracked, environment, python

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(util.find_spec("mypy") is None, reason="needs mypy"),
]
SCRIPT = (Path(__file__).parent / "typed_use.py").read_text()
# What is written instead of what, and the kind of error that mypy must find.
MISTAKES = (
    ("stride=2, backend", 'stride="2", backend', "arg-type"),
    ("(3, 224, 224)", "224", "arg-type"),
    ("verify=True", "verified=True", "call-arg"),
    ("report.summary", "report.sumary", "attr-defined"),
    ("weights: mk.FoldedWeights", "weights: Tensor", "assignment"),
    ("return fused, mk.plan", "return mk.plan", "return-value"),
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("types")
    wheel, printed = build("wheel", copy_tracked(folder / "source"), folder / "out", **SKIP)
    assert wheel, printed
    return clean_environment(wheel, folder / "environment")


def errors(text: str, interpreter: Path, folder: Path) -> list[str]:
    script = folder / "script.py"
    script.write_text(text)
    checker = ["-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"]
    checker += ["--config-file", "", "--cache-dir", str(ROOT / "build/mypy")]
    checker += ["--python-executable", str(interpreter), str(script)]
    done = python(*checker, cwd=folder, env=environment())
    assert done.returncode in (0, 1), done.stdout
    return done.stdout.splitlines()


@pytest.mark.timeout(900)
def test_a_users_script_is_right(installed, tmp_path):
    assert errors(SCRIPT, installed, tmp_path) == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("right, wrong, kind", MISTAKES, ids=[m[1] for m in MISTAKES])
def test_a_users_mistake_is_found(right, wrong, kind, installed, tmp_path):
    assert SCRIPT.count(right) == 1
    found = errors(SCRIPT.replace(right, wrong), installed, tmp_path)
    assert found and found[0].endswith(f"[{kind}]"), found
