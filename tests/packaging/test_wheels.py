"""Wheels for others, as `make wheels` builds them: installed where there is no compiler.

MNV2_WHEELS is the folder with the wheel.
"""

import os
import platform
import re
from pathlib import Path

import pytest
import torch
from builds import OFFLINE, clean_environment, environment, python, unpack

pytestmark = pytest.mark.skipif("MNV2_WHEELS" not in os.environ, reason="make wheels runs this")

CALL = """
import torch, mnv2_kernels as mk
from mnv2_kernels import _C
assert _C.__file__.startswith(sys.prefix), _C.__file__
kernels = [kernel["name"] for kernel in _C.cpu_kernels()]
print(*kernels)
block, x = mk.InvertedResidual(24, 24).eval(), torch.randn(2, 24, 15, 13)
y = mk.inverted_residual(x, mk.fold(block), residual=True, backend="cpu")
with torch.no_grad():
    torch.testing.assert_close(y, block.plain_forward(x), rtol=1e-4, atol=1e-4)
"""


@pytest.fixture
def wheel() -> Path:
    (found,) = Path(os.environ["MNV2_WHEELS"]).resolve().glob("*.whl")
    return found


def test_it_says_what_it_is_for(wheel, tmp_path):
    platforms = wheel.stem.rsplit("-", 1)[1].split(".")
    assert all(re.fullmatch(rf"manylinux_2_\d+_{platform.machine()}", p) for p in platforms)
    site = unpack(wheel, tmp_path)
    (metadata,) = site.glob("*.dist-info/METADATA")
    release = ".".join(torch.__version__.split(".")[:2])
    assert f"\nRequires-Dist: torch=={release}.*\n" in metadata.read_text()
    assert len(list(site.rglob("*.so*"))) == 1, "libraries of torch or a compiler are inside"


def test_it_runs_without_a_compiler(wheel, tmp_path):
    interpreter = clean_environment(wheel, tmp_path / "environment")
    kept = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    bare = kept | {"PATH": str(tmp_path), "CC": "/bin/false", "CXX": "/bin/false"}
    done = python("-c", OFFLINE + CALL, cwd=tmp_path, env=bare, executable=interpreter)
    assert done.returncode == 0, done.stdout
    kernels = {"x86_64": "avx512 avx2 default"}.get(platform.machine(), "neon")
    assert done.stdout.strip() == kernels
