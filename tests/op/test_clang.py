"""The CPU kernels as clang compiles them, for every instruction set, against float64.

Compilers differ in what a target region is, and in what they keep in registers. The driver is that
of test_neon.py. Needs clang, and for NEON what test_neon.py needs; the long form builds the whole
extension too.
"""

import platform
import shutil

import cpu_driver
import pytest
from builds import OFFLINE, build, copy_tracked, environment, python, unpack
from cases import LONG

MACHINE = platform.machine()
CROSS = ("aarch64-linux-gnu-g++", "qemu-aarch64")

pytestmark = [
    pytest.mark.sampled(3),
    pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++"),
    pytest.mark.timeout(1200),
]

CALLS_ON_THREADS = """
import torch, mnv2_kernels as mk
from mnv2_kernels import _C
assert "clang" in _C.build_info()["compiler"].lower(), _C.build_info()
model, x = mk.mobilenet_v2(0.35).eval(), torch.randn(4, 3, 64, 64)
with torch.inference_mode():
    truth, fused = model.double()(x.double()), mk.fuse(model.float())
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for y in (fused(x), mk.plan(fused, (3, 64, 64))(x)):
            torch.testing.assert_close(y.double(), truth, rtol=1e-3, atol=1e-4)
"""


def check(kernel: str, command: list, what: str, least: int) -> None:
    outcome = cpu_driver.run(command, kernel, what)
    assert not outcome.found, (outcome.printed[-500:], outcome.errors)
    assert outcome.counts["calls"] >= least


WHAT = [("blocks", 1500), ("networks", 60), ("backward", 250)]


@pytest.mark.parametrize("what, least", WHAT)
@pytest.mark.parametrize("kernel", cpu_driver.kernels_here())
def test_kernels_of_this_machine(kernel, what, least):
    flags = ("-O3" if LONG else "-O1", "-Werror")
    driver = cpu_driver.build([kernel], flags, compiler="clang++")
    check(kernel, [driver], what, least)


@pytest.mark.skipif(
    MACHINE != "x86_64" or None in map(shutil.which, CROSS), reason=f"needs {' and '.join(CROSS)}"
)
@pytest.mark.skipif(not LONG, reason="of the long run: emulated")
@pytest.mark.parametrize("what, least", WHAT)
def test_neon(what, least):
    flags = ("--target=aarch64-linux-gnu", "-O1", "-Werror", "-static")
    driver = cpu_driver.build(["neon"], flags, compiler="clang++")
    check("neon", ["qemu-aarch64", driver], what, least)


@pytest.mark.skipif(not LONG, reason="of the long run: compiles for minutes")
def test_the_extension(tmp_path):
    compiler = {"CC": "clang", "CXX": "clang++", "MNV2_KERNELS_CUDA": "0"}
    source = copy_tracked(tmp_path / "source")
    wheel, printed = build(
        "wheel", source, tmp_path / "out", **compiler, MNV2_KERNELS_FORCE_BUILD="1"
    )
    assert wheel, printed
    site = unpack(wheel, tmp_path / "site")
    done = python("-S", "-c", OFFLINE + CALLS_ON_THREADS, cwd=tmp_path, env=environment(site))
    assert done.returncode == 0, done.stdout
