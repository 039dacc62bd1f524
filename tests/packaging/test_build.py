"""Building, packing and importing, with and without a compiler; every build is of a copy."""

import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from builds import (
    BROKEN,
    CXX,
    FORCE,
    OFFLINE,
    ROOT,
    SKIP,
    build,
    clean_environment,
    environment,
    program,
    python,
    run_offline,
    unpack,
)

from mnv2_kernels.ops.extension import module as _C

pytestmark = pytest.mark.serial

CSRC_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".inc"}
WITHOUT_EXTENSION = """
import torch, mnv2_kernels as mk
from mnv2_kernels.ops.backends import ran
from mnv2_kernels.block.config import RELU6, NO_CLIP
why = mk.backends()["cpu"]
assert why.startswith("cannot run: the compiled extension is not available"), why
weights = mk.FoldedWeights(
    torch.randn(8, 48), torch.randn(48), torch.randn(3, 3, 48), torch.randn(48),
    torch.randn(48, 8), torch.randn(8), RELU6, RELU6, NO_CLIP)
y = mk.inverted_residual(torch.randn(1, 8, 7, 7), weights, residual=True)
assert y.shape == (1, 8, 7, 7) and ran() == {"reference": 1}
"""
# The op, a fused network and a plan against plain layers in float64, and two commands.
IN_A_CLEAN_ENVIRONMENT = """
import runpy, torch
import mnv2_kernels as mk
from mnv2_kernels.ops import reference
from mnv2_kernels import _C
from mnv2_kernels.ops.backends import ran

assert _C.__file__.startswith(sys.prefix), _C.__file__
torch.manual_seed(0)
x = torch.randn(2, 24, 15, 13)
weights = mk.fold(mk.InvertedResidual(24, 24).eval())
settings = dict(stride=1, padding=(1, 1, 1, 1), dilation=1, residual=True)
y = mk.inverted_residual(x, weights, **settings)
assert ran() == {"cpu": 1}
truth = reference.inverted_residual(x.double(), weights.to(torch.float64), **settings)
torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-4)
model, images = mk.mobilenet_v2(0.35).eval(), torch.randn(2, 3, 64, 64)
with torch.inference_mode():
    truth = model.double()(images.double())
    fused = mk.fuse(model.float())
    assert str(mk.explain(fused)).count("cpu") >= 17
    for logits in (fused(images), mk.plan(fused, (3, 64, 64))(images)):
        torch.testing.assert_close(logits.double(), truth, rtol=1e-3, atol=1e-4)
for command in ("info", "verify"):
    sys.argv = ["mnv2", command]
    try:
        runpy.run_module("mnv2_kernels", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
"""


def csrc_files() -> set[str]:
    """The files below csrc that a build reads, as paths from the root."""
    paths = (ROOT / "csrc").rglob("*")
    return {path.relative_to(ROOT).as_posix() for path in paths if path.suffix in CSRC_SUFFIXES}


def test_pip_install_without_a_compiler(source, tmp_path):
    site = tmp_path / "site"
    pip = "-m pip --disable-pip-version-check install -q --no-build-isolation --no-deps --no-index"
    arguments = [*pip.split(), "--target", str(site), "."]
    done = python(*arguments, cwd=source, env=environment(**SKIP, **BROKEN))
    assert done.returncode == 0, done.stdout
    run_offline(WITHOUT_EXTENSION, site, tmp_path)


def test_wheel_with_a_broken_compiler(source, tmp_path):
    wheel, printed = build("wheel", source, tmp_path / "out", **BROKEN)
    assert wheel, printed
    assert "mnv2_kernels: the extension was not built:" in printed
    run_offline(WITHOUT_EXTENSION, unpack(wheel, tmp_path / "site"), tmp_path)


def test_editable_install_with_a_broken_compiler(source, tmp_path):
    wheel, printed = build("editable", source, tmp_path / "out", **BROKEN)
    assert wheel, printed
    assert "mnv2_kernels: the extension was not built:" in printed
    run_offline(WITHOUT_EXTENSION, source, tmp_path)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_forced_build_fails_with_its_compiler(kind, source, tmp_path):
    wheel, printed = build(kind, source, tmp_path / "out", **BROKEN, **FORCE)
    assert wheel is None, printed


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_build_without_torch_says_what_to_type(kind, source, tmp_path):
    (source / "torch.py").write_text("raise ImportError('no torch here')")
    wheel, printed = build(kind, source, tmp_path / "out", site=source)
    assert wheel is None
    said = printed[printed.index("mnv2_kernels compiles") :].splitlines()
    assert said[0].endswith("the installed PyTorch, 2.11 or later: no torch here. Type")
    assert said[2].endswith(
        "pip install -U torch setuptools ninja && pip install --no-build-isolation ."
    )
    assert said[4].endswith("MNV2_KERNELS_SKIP_CPP=1 pip install .")
    wheel, printed = build(kind, source, tmp_path / "out", site=source, **SKIP)
    assert wheel, printed


def test_a_torch_that_is_too_old_is_told_before_anything_is_compiled(source, tmp_path):
    """pip would bring another one after the build, which the extension does not fit."""
    (source / "torch/utils").mkdir(parents=True)
    (source / "torch/__init__.py").write_text("__version__ = '2.10.1+cpu'")
    (source / "torch/utils/cpp_extension.py").write_text("BuildExtension = object")
    wheel, printed = build("wheel", source, tmp_path / "out", site=source)
    assert wheel is None and "2.11 or later: got 2.10.1+cpu. Type" in printed


# What pip runs in every process of an isolated build: the environment's packages are hidden.
ISOLATED = """
import site, sys
sys.path = [path for path in sys.path if path not in site.getsitepackages()]
"""


def test_an_isolated_build_finds_the_torch_of_its_environment(source, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sitecustomize.py").write_text(ISOLATED)
    shutil.copytree(Path(setuptools.__file__).parent, tools / "setuptools")
    shutil.copytree(metadata.distribution("setuptools")._path, tools / "setuptools.dist-info")
    cxx = program(tmp_path / "bin/c++", CXX)
    variables = {"MNV2_KERNELS_CUDA": "0", "CC": cxx, "CXX": cxx, **FORCE}
    for start in ("import torch", "import sys, setuptools"):
        code = f"{start}; sys.argv = ['setup.py', '-q', 'bdist_wheel']; import runpy"
        code += "; runpy.run_path('setup.py')"
        env = environment(**variables) | {"PYTHONPATH": str(tools)}
        done = python("-c", code, cwd=source, env=env)
        assert (done.returncode == 0) == ("torch" not in start), done.stdout
    (wheel,) = (source / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert f"mnv2_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names


def test_sdist_by_hand_in_a_fresh_tree(source):
    before = {path.name for path in source.iterdir()}
    done = python("setup.py", "-q", "sdist", cwd=source, env=environment(**SKIP))
    assert done.returncode == 0, done.stdout
    assert [path.suffixes[-2:] for path in (source / "dist").iterdir()] == [[".tar", ".gz"]]
    added = {path.name for path in source.iterdir()} - before
    assert added == {"dist", "mnv2_kernels.egg-info"}


@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.environ.get("MNV2_KERNELS_SKIP_CPP") == "1", reason="no C++ compiler asked")
def test_sdist_to_wheel_to_call(source, tmp_path, setup_py):
    sdist, printed = build("sdist", source, tmp_path / "sdist", **SKIP)
    assert sdist, printed
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    files = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    assert csrc_files() <= files
    assert {"Makefile", "LICENSE", "constraints.txt", "tests/packaging/test_build.py"} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc", ".o"))]

    # Without optimising, which takes a third of the time.
    wheel, printed = build("wheel", unpacked, tmp_path / "out", DEBUG="1", **FORCE)
    assert wheel, printed
    site = unpack(wheel, tmp_path / "site")
    run_offline(
        "import mnv2_kernels as mk; from mnv2_kernels import _C\n"
        f"assert _C.build_info()['source_hash'] == {setup_py['hash']!r}, _C.build_info()\n"
        f"assert _C.__file__.startswith({str(site)!r}), _C.__file__\n"
        "assert mk.backends()['cpu'].startswith('float32'), mk.backends()",
        site,
        tmp_path,
    )
    # A platform's wheel names it, and this interpreter's ABI.
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    machine = sysconfig.get_platform().replace("-", "_")
    assert wheel.stem.split("-")[2:] == [tag, tag, machine]
    (said,) = site.glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false" in said.read_text()
    interpreter = clean_environment(wheel, tmp_path / "environment")
    alone = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    program = OFFLINE + IN_A_CLEAN_ENVIRONMENT
    done = python("-c", program, cwd=tmp_path, env=alone, executable=interpreter)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^backend cpu +float32", done.stdout, re.MULTILINE), done.stdout
    done = python("info", cwd=tmp_path, env=alone, executable=interpreter.parent / "mnv2")
    assert done.returncode == 0 and str(interpreter.parents[1]) in done.stdout, done.stdout
    in_wheel = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    info = {name for name in in_wheel if name.startswith("mnv2_kernels-")}
    package = (source / "mnv2_kernels").rglob("*")
    kinds = (".py", ".json", ".typed")
    expected = {p.relative_to(source).as_posix() for p in package if p.suffix in kinds}
    extension = f"mnv2_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert in_wheel - info == expected | {extension}


@pytest.mark.skipif(os.environ.get("MNV2_KERNELS_SKIP_CPP") == "1", reason="no C++ compiler asked")
def test_the_extension_in_use_is_built_from_these_sources(setup_py):
    assert _C is not None
    assert _C.build_info()["source_hash"] == setup_py["hash"]


def test_every_source_is_listed(setup_py):
    listed = {name for key, names in setup_py.items() if key.endswith("_SOURCES") for name in names}
    sources = {name for name in csrc_files() if name.endswith((".cpp", ".cu"))}
    assert listed == sources


def test_every_other_file_is_included():
    names = csrc_files()
    texts = [(ROOT / name).read_text() for name in names]
    included = {Path(path).name for text in texts for path in re.findall(r'#include "(.+)"', text)}
    unused = {name for name in names if name.endswith((".h", ".cuh", ".inc"))}
    assert {name for name in unused if Path(name).name not in included} == set()


def test_no_flag_ties_the_build_to_a_machine_or_loosens_arithmetic(setup_py):
    flags = str([vars(module) for module in setup_py["arguments"]["ext_modules"]])
    assert not re.findall(r"-march|-mtune|-mcpu|-mavx|-mfma|fast-math|-Ofast", flags)


def test_kernels_do_not_know_torch():
    kernels = [name for name in csrc_files() if name.startswith(("csrc/cpu/", "csrc/cuda/"))]
    assert kernels
    for name in [*kernels, "csrc/block.h"]:
        text = (ROOT / name).read_text()
        found = re.findall(r"#include *[<\"](?:torch|ATen|c10|pybind11)\b.*", text)
        assert not found, f"{name}: {found}"
