"""Building, packing and importing, with and without a compiler; every build is of a copy."""

import os
import re
import runpy
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from builds import (
    OFFLINE,
    ROOT,
    SKIP,
    build,
    clean_environment,
    environment,
    python,
    run_offline,
    unpack,
)
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from mnv2_kernels.ops.extension import module as _C

pytestmark = pytest.mark.serial

CSRC_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".inc"}
BROKEN = {"CC": "/bin/false", "CXX": "/bin/false"}
FORCE = {"MNV2_KERNELS_FORCE_BUILD": "1"}
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


@pytest.fixture
def source(tmp_path):
    """A copy of what a build needs, without leftovers of other builds."""
    copy = tmp_path / "source"
    left = ("*.so", "__pycache__", ".*", "build", "dist", "*.egg-info", "results")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left))
    return copy


@contextmanager
def read_setup_py():
    """setup.py's functions and lists; `arguments` is what it hands to setup()."""
    with pytest.MonkeyPatch.context() as patch:
        arguments = {}
        patch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
        patch.delenv("MNV2_KERNELS_SKIP_CPP", raising=False)
        patch.chdir(ROOT)
        names = runpy.run_path("setup.py")
        yield names | {"arguments": arguments, "hash": names["source_hash"]()}


@pytest.fixture(scope="module")
def setup_py():
    with read_setup_py() as found:
        yield found


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


# ---- CUDA, as far as a machine without it goes: a torch that says it has CUDA, and a false nvcc.

NVCC = """#!/bin/sh
case "$*" in --version) echo "Cuda compilation tools, release {release}, V{release}.88";;
--list-gpu-code) echo sm_75 sm_80 sm_90 sm_120;;
*) echo "nvcc: this is no compiler" >&2; exit 1;; esac
"""
# Links as well as it compiles: it leaves an empty file.
CXX = """#!/bin/sh
out=; for argument; do [ "$out" = next ] && out="$argument" && break
[ "$argument" = -o ] && out=next; done
case "$out" in *.o|*.so) : > "$out";; *) exec g++ "$@";; esac
"""


def program(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A function that makes torch find an nvcc of this release, and says where."""

    def make(release: str) -> Path:
        home = tmp_path / "cuda"
        program(home / "bin/nvcc", NVCC.format(release=release))
        monkeypatch.setattr("torch.version.cuda", "13.0")
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(home))
        return home

    for variable in ("MNV2_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST", "MNV2_KERNELS_FORCE_BUILD"):
        monkeypatch.delenv(variable, raising=False)
    return make


def test_why_there_are_no_cuda_kernels(setup_py, toolkit, monkeypatch):
    why_no_cuda = setup_py["why_no_cuda"]
    monkeypatch.setattr("torch.version.cuda", None)
    assert why_no_cuda() == "torch has no CUDA"
    home = toolkit("13.2")
    assert why_no_cuda() is None
    toolkit("12.8")
    assert why_no_cuda() == "nvcc was of CUDA 12.8 when it was built, torch of CUDA 13.0"
    monkeypatch.setenv("MNV2_KERNELS_CUDA", "0")
    assert why_no_cuda() == "MNV2_KERNELS_CUDA=0 left them out"
    monkeypatch.delenv("MNV2_KERNELS_CUDA")
    (home / "bin/nvcc").unlink()
    assert why_no_cuda() == "nvcc was not found when it was built"
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setenv("PATH", "")
    assert why_no_cuda() == "nvcc was not found when it was built"


def test_what_is_built_with_cuda(toolkit, monkeypatch):
    toolkit("13.0")
    with read_setup_py() as found:
        (module,) = found["arguments"]["ext_modules"]
    assert module.sources == found["CPU_SOURCES"] + found["CUDA_SOURCES"]
    assert {"cudart", "c10_cuda"} <= set(module.libraries)
    flags = module.extra_compile_args["nvcc"]
    assert [flag for flag in flags if "arch" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    defined = {flag for flag in COMMON_NVCC_FLAGS if flag.startswith("-D")}
    assert defined == {flag.replace("-U", "-D") for flag in flags if flag.startswith("-U")}


@pytest.mark.parametrize(
    ("asked", "built", "said"),
    [
        ("9.0a", "9.0a", ""),
        ("8.0 8.6 9.0+PTX", "8.0;8.6;9.0+PTX", ""),
        (" 8.0;;9.0 ", "8.0;9.0", ""),
        ("7.0 7.5 8.0 8.6 9.0+PTX", "8.0;8.6;9.0+PTX", "7.0, 7.5 of TORCH_CUDA_ARCH_LIST"),
        ("Volta;Ampere", "Ampere", "Volta of TORCH_CUDA_ARCH_LIST"),
        ("7.5", "8.0", "GPUs must be of compute capability 8.0 or later; 7.5 of"),
    ],
)
def test_gpus_that_somebody_names(toolkit, monkeypatch, capsys, asked, built, said):
    toolkit("13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with read_setup_py() as found:
        (module,) = found["arguments"]["ext_modules"]
    assert not [flag for flag in module.extra_compile_args["nvcc"] if "arch" in flag]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == built
    printed = capsys.readouterr().err
    assert said in printed and bool(printed) == bool(said)


PRETEND = """
import torch
torch.version.cuda = "13.0"
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = {home!r}
"""


def build_with_a_false_nvcc(
    source: Path, home: Path, tmp_path: Path, **variables: str
) -> tuple[int, str]:
    """`setup.py build_ext --inplace` where nvcc fails and every other compiler is quick."""
    cxx = program(tmp_path / "bin/c++", CXX)
    setup = f"import sys, runpy; sys.argv = ['setup.py', 'build_ext', '--inplace']\n{PRETEND}"
    setup = setup.format(home=str(home)) + "runpy.run_path('setup.py')"
    done = python("-c", setup, cwd=source, env=environment(CC=cxx, CXX=cxx, **variables))
    return done.returncode, done.stdout


def test_nvcc_that_fails_costs_the_cuda_kernels_alone(source, tmp_path, toolkit):
    home = toolkit("13.0")
    code, printed = build_with_a_false_nvcc(source, home, tmp_path)
    assert code == 0, printed
    assert "mnv2_kernels: no CUDA kernels were built:" in printed
    assert len(list((source / "mnv2_kernels").glob("_C*.so"))) == 1
    said = (source / "build/generated/cuda_build.h").read_text()
    assert said == '#define MNV2_WHY_NO_CUDA "nvcc failed when it was built"\n'


@pytest.mark.parametrize("variable", ["MNV2_KERNELS_CUDA", "MNV2_KERNELS_FORCE_BUILD"])
def test_nvcc_must_not_fail_where_that_is_asked(variable, source, tmp_path, toolkit):
    code, printed = build_with_a_false_nvcc(source, toolkit("13.0"), tmp_path, **{variable: "1"})
    assert code != 0 and "this is no compiler" in printed, printed
    assert not list((source / "mnv2_kernels").glob("_C*.so"))


def test_cuda_kernels_that_are_asked_for_must_be_there(source, tmp_path):
    asked = {"MNV2_KERNELS_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    wheel, printed = build("wheel", source, tmp_path / "out", **asked)
    assert wheel is None
    assert "RuntimeError: MNV2_KERNELS_CUDA=1 asks for CUDA kernels, but " in printed


def test_kernels_do_not_know_torch():
    kernels = [name for name in csrc_files() if name.startswith(("csrc/cpu/", "csrc/cuda/"))]
    assert kernels
    for name in [*kernels, "csrc/block.h"]:
        text = (ROOT / name).read_text()
        found = re.findall(r"#include *[<\"](?:torch|ATen|c10|pybind11)\b.*", text)
        assert not found, f"{name}: {found}"
