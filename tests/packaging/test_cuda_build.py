"""Building with CUDA where there is none: a torch that says it has CUDA, and a false nvcc."""

import os
from pathlib import Path

import pytest
from builds import CXX, build, environment, program, python, read_setup_py
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

pytestmark = pytest.mark.serial

NVCC = """#!/bin/sh
case "$*" in --version) echo "Cuda compilation tools, release {release}, V{release}.88";;
--list-gpu-code) echo sm_75 sm_80 sm_90 sm_120;;
*) echo "nvcc: this is no compiler" >&2; exit 1;; esac
"""


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
