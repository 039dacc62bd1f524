"""The whole extension under AddressSanitizer and UndefinedBehaviorSanitizer, called by torch.

A copy of the package whose extension is compiled for the sanitizers runs tests of this folder in a
process that loads their libraries first. Only in the long run: torch's headers take long to
compile. test_sanitized.py has its kernels.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import cpu_driver
import pytest
import torch
from cases import LONG
from cpu_driver import ADDRESS, ROOT
from torch.utils.cpp_extension import include_paths

WHY_NOT = cpu_driver.why_not(ADDRESS)
pytestmark = [
    pytest.mark.skipif(not LONG, reason="compiles the extension for the sanitizers: MNV2_LONG=1"),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(3000),
]
HOST = [*(p for p in (ROOT / "csrc/torch").glob("*.cpp") if "cuda" not in p.name)]
HOST.append(ROOT / "csrc/cuda/choose.cpp")
PARTS = {
    "values": ["op/test_inverted_residual.py", "-k", "cpu and (S2 or S3 or S4)"],
    "canaries": ["sanitizers/test_memory_safety.py", "-k", "neighbours and cpu"],
    "random calls": ["op/test_fuzz.py", "-k", "cpu"],
    "gradients": ["op/test_backward.py"],
    "programs": ["network/test_plan_op.py"],
    "bad calls": ["op/test_bad_calls.py"],
    "guards": ["modules/test_guard.py", "modules/test_guard_tensors.py"],
}


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder with the package, the benchmarks that tests use, and the tests."""
    folder = tmp_path_factory.mktemp("sanitized")
    best = cpu_driver.kernels_here()[:1]
    flags = [*ADDRESS, "-std=c++20", "-fvisibility=hidden", "-w"]
    flags += [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    flags += [
        f"-I{ROOT / 'build/generated'}",
        "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
    ]
    objects = list(map(str, cpu_driver.objects(best, ADDRESS)))
    for source in HOST:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run(["g++", *flags, "-c", source, "-o", objects[-1]], check=True)
    libraries = Path(torch.__file__).parent / "lib"
    (folder / "mnv2_kernels").mkdir()
    for path in (ROOT / "mnv2_kernels").iterdir():
        if path.suffix != ".so":
            (folder / "mnv2_kernels" / path.name).symlink_to(path)
    for name in ("tests", "benchmarks", "csrc", "examples"):
        (folder / name).symlink_to(ROOT / name)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    named = [f"-l{name}" for name in ("c10", "torch_cpu", "torch", "torch_python")]
    command = ["g++", *ADDRESS, "-shared", *objects, f"-L{libraries}", *named]
    to = folder / "mnv2_kernels" / f"_C{suffix}"
    subprocess.run([*command, *cpu_driver.aliases(best), "-o", to], check=True)
    return folder


def run(package: Path, *command: str) -> subprocess.CompletedProcess:
    preloaded = [cpu_driver.library(f"lib{name}.so") for name in ("asan", "ubsan", "stdc++")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (package, package / "tests/helpers"))),
        "LD_PRELOAD": " ".join(preloaded),
        # Python keeps much to itself until it ends, and torch refuses what is beyond all memory.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "OMP_NUM_THREADS": "3",
    }
    environment.pop("MNV2_LONG")
    command = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True)


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_reported(package, part):
    file, *chosen = PARTS[part]
    arguments = [f"tests/{file}", *chosen, "-p", "no:cacheprovider", "--import-mode=importlib"]
    done = run(package, "-m", "pytest", "-q", "-x", "--rootdir", str(package), *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 1


def test_a_weight_that_ends_too_early_is_reported(package):
    """By the extension of the copy."""
    code = """
import ctypes, torch
import mnv2_kernels as mk
from mnv2_kernels import _C
print(_C.__file__, flush=True)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
held = (ctypes.c_char * 256).from_address(libc.malloc(ctypes.c_size_t(252)))
weights = mk.FoldedWeights(
    w_expand=None, b_expand=None, w_dw=torch.randn(3, 3, 8), b_dw=None,
    w_project=torch.frombuffer(held, dtype=torch.float32).view(8, 8), b_project=None,
    clip_expand=(0.0, 6.0), clip_dw=(0.0, 6.0), clip_project=(0.0, 6.0),
)
mk.inverted_residual(torch.randn(1, 8, 5, 6), weights, backend="cpu")
"""
    done = run(package, "-c", code)
    assert done.stdout.startswith(str(package / "mnv2_kernels")), done.stderr
    assert done.returncode != 0 and cpu_driver.REPORTS["address"] in done.stderr
