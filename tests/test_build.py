"""Building, packing and importing, with and without a compiler; every build is of a copy."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

from mnv2_kernels.extension import module as _C

pytestmark = pytest.mark.serial

ROOT = Path(__file__).parent.parent
CSRC_SUFFIXES = {".cpp", ".cu", ".h", ".inc"}
BROKEN = {"CC": "/bin/false", "CXX": "/bin/false"}
SKIP = {"MNV2_KERNELS_SKIP_CPP": "1"}
FORCE = {"MNV2_KERNELS_FORCE_BUILD": "1"}

# `-S` keeps an editable installation of the checkout, and with it its extension, out of sight.
OFFLINE = """
import sys
def forbid(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise RuntimeError(f"network access: {event} {args}")
sys.addaudithook(forbid)
"""
WITHOUT_EXTENSION = """
import torch, mnv2_kernels as mk
from mnv2_kernels.backends import last_backend
from mnv2_kernels.block import RELU6, NO_CLIP
why = mk.backends()["cpu"]
assert why.startswith("cannot run: the compiled extension is not available"), why
weights = mk.FoldedWeights(
    torch.randn(8, 48), torch.randn(48), torch.randn(3, 3, 48), torch.randn(48),
    torch.randn(48, 8), torch.randn(8), RELU6, RELU6, NO_CLIP)
y = mk.inverted_residual(torch.randn(1, 8, 7, 7), weights, residual=True)
assert y.shape == (1, 8, 7, 7) and last_backend() == "reference"
"""


def environment(site: Path | None = None, **variables: str) -> dict[str, str]:
    """This one less what steers a build, with `site` before the installed packages."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MNV2_KERNELS_")}
    packages = [str(site)] if site else []
    packages.append(sysconfig.get_path("purelib"))
    # Beside this interpreter is its ninja, which compiles the files side by side.
    programs = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    paths = {"PYTHONPATH": os.pathsep.join(packages), "PATH": os.pathsep.join(programs)}
    return inherited | paths | variables


def python(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_offline(code: str, site: Path, cwd: Path) -> str:
    done = python("-S", "-c", OFFLINE + code, cwd=cwd, env=environment(site))
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(
    kind: str, source: Path, out: Path, site: Path | None = None, **variables: str
) -> tuple[Path | None, str]:
    """The wheel, editable wheel or sdist, None where the build failed, and what it printed."""
    out.mkdir(exist_ok=True)
    code = f"{OFFLINE}\nfrom setuptools import build_meta\nbuild_meta.build_{kind}({str(out)!r})"
    done = python("-S", "-c", code, cwd=source, env=environment(site, **variables))
    return (next(out.iterdir()) if done.returncode == 0 else None), done.stdout


def unpack(wheel: Path, out: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
    return out


def csrc_files() -> set[str]:
    """The files below csrc that a build reads, as paths from the root."""
    paths = (ROOT / "csrc").rglob("*")
    return {path.relative_to(ROOT).as_posix() for path in paths if path.suffix in CSRC_SUFFIXES}


@pytest.fixture
def source(tmp_path):
    """A copy of what a build needs, without what other builds left behind."""
    copy = tmp_path / "source"
    left = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "*.egg-info", "results")
    shutil.copytree(ROOT, copy, ignore=left)
    return copy


@pytest.fixture(scope="module")
def setup_py():
    """setup.py's functions and lists; `arguments` is what it hands to setup()."""
    with pytest.MonkeyPatch.context() as patch:
        arguments = {}
        patch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
        patch.delenv("MNV2_KERNELS_SKIP_CPP", raising=False)
        patch.chdir(ROOT)
        names = runpy.run_path("setup.py")
        yield names | {"arguments": arguments, "hash": names["source_hash"]()}


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


def test_wheel_without_torch_says_what_is_left_out(source, tmp_path):
    (source / "torch.py").write_text("raise ImportError('no torch here')")
    wheel, printed = build("wheel", source, tmp_path / "out", site=source)
    assert wheel, printed
    assert "building without the extension: no torch here" in printed


@pytest.mark.skipif(os.environ.get("MNV2_KERNELS_SKIP_CPP") == "1", reason="no C++ compiler asked")
def test_sdist_to_wheel_to_call(source, tmp_path, setup_py):
    sdist, printed = build("sdist", source, tmp_path / "sdist", **SKIP)
    assert sdist, printed
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    files = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    assert csrc_files() <= files
    assert {"Makefile", "LICENSE", "constraints.txt", "tests/test_build.py"} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc", ".o"))]

    wheel, printed = build("wheel", unpacked, tmp_path / "out", **FORCE)
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
    in_wheel = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    info = {name for name in in_wheel if name.startswith("mnv2_kernels-")}
    package = (source / "mnv2_kernels").rglob("*")
    expected = {p.relative_to(source).as_posix() for p in package if p.suffix in (".py", ".json")}
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
