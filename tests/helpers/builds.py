"""Steps that tests of building and packing share; every build is of a copy."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
SKIP = {"MNV2_KERNELS_SKIP_CPP": "1"}
BROKEN = {"CC": "/bin/false", "CXX": "/bin/false"}
FORCE = {"MNV2_KERNELS_FORCE_BUILD": "1"}
# Links as well as it compiles: it leaves an empty file.
CXX = """#!/bin/sh
out=; for argument; do [ "$out" = next ] && out="$argument" && break
[ "$argument" = -o ] && out=next; done
case "$out" in *.o|*.so) : > "$out";; *) exec g++ "$@";; esac
"""

# `-S` keeps an editable installation of the checkout, and with it its extension, out of sight.
OFFLINE = """
import sys
def forbid(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise RuntimeError(f"network access: {event} {args}")
sys.addaudithook(forbid)
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


def python(
    *arguments: str, cwd: Path, env: dict[str, str], executable: Path | str = sys.executable
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [executable, *arguments],
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


def tracked_files() -> list[str]:
    """The files that git tracks here, as paths from the root; none where this is no clone."""
    if not (ROOT / ".git").exists():
        return []
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return sorted(filter(None, names.stdout.decode().split("\0")))


def copy_tracked(to: Path) -> Path:
    for name in tracked_files():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)
    return to


def clean_environment(wheel: Path, folder: Path) -> Path:
    """The interpreter of an environment of its own, with this wheel as a user installs it.

    Other packages are those installed here, but for an editable installation of the checkout.
    """
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    interpreter = folder / "bin/python"
    pip = ["-m", "pip", "--disable-pip-version-check", "--python", str(interpreter)]
    done = python(
        *pip, "install", "-q", "--no-deps", "--no-index", str(wheel), cwd=folder, env=environment()
    )
    assert done.returncode == 0, done.stdout
    return interpreter


def program(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


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
