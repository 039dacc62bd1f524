"""What must not pass for a test or a sanitized run on the GPU, and what is kept of one."""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import sanitized
from benchmarks.machine import ROOT
from mnv2_kernels.block.config import NO_CLIP, RELU6
from mnv2_kernels.ops import extension
from mnv2_kernels.ops.backends import Block, cuda_kernel


def test_a_child_is_ended_with_its_children():
    inner = "import subprocess, sys, time; subprocess.run(['sleep', '60']); print('late')"
    start = time.monotonic()
    code, output = gpu_checks.child([sys.executable, "-c", inner], 0.5)
    assert code is None and "late" not in output and time.monotonic() - start < 20
    code, output = gpu_checks.child([sys.executable, "-c", "print('x'); raise SystemExit(3)"], 30)
    assert (code, output) == (3, "x\n")


RAN = {"device": 5, "cuda": 1}
GOOD = {"passed": 3, "failed": 0, "skipped": 1, "unfinished": 0}


@pytest.mark.parametrize(
    ("code", "counts", "launches", "words"),
    [
        (0, GOOD, RAN, None),
        (0, GOOD, {**RAN, "interpreted: tests/a.py::test_interpreter": 2}, None),
        (0, GOOD, {**RAN, "interpreted: tests/a.py::test_values": 2}, "the interpreter ran"),
        (0, GOOD, {"cuda": 1}, "no Triton kernel ran on the device"),
        (0, GOOD, {"device": 5}, "no CUDA kernel ran"),
        (0, GOOD | {"passed": 0}, RAN, "none passed"),
        (1, GOOD | {"failed": 2}, RAN, "2 failed"),
        (5, GOOD, RAN, "pytest ended with 5"),
        (None, GOOD, RAN, "ended: their time was over"),
    ],
)
def test_tests_that_prove_nothing_are_told(code, counts, launches, words):
    found = gpu_checks.complaints(code, counts, Counter(launches))
    assert found == [] if words is None else words in "; ".join(found)


TESTS = """
import pytest
from benchmarks.gpu import sanitized
def test_values(): sanitized.check(13, sanitized.DTYPES[1], 'cpu', 'triton')
def test_cuda():
    from mnv2_kernels.ops import inverted_residual as ops
    import torch
    shapes = (1, 4, 3, 3), (4, 8), (8,), (3, 3, 8), (8,), (8, 4)
    tensors = [torch.zeros(shape) for shape in shapes]
    settings = (None, 1, [1, 1, 1, 1], 1, False, [0.0, 6.0], [0.0, 6.0], [0.0, 6.0])
    assert ops._ops["cuda"](*tensors, *settings).shape == (1, 4, 3, 3)
def test_wrong(): assert False
@pytest.mark.skip
def test_none(): pass
@pytest.fixture
def broken():
    yield
    assert False
def test_undone(broken): pass
"""


def run_plugin(folder: Path, source: str, seconds: float, *options: str):
    """(exit code, outcome by name, launches by place) of tests run as on the device."""
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
    command += ["-p", "benchmarks.gpu.checks", *options, str(folder)]
    code, _ = gpu_checks.child(command, seconds, MNV2_DEVICE_TESTS=str(folder))
    tests, launches = gpu_checks.kept(folder)
    return code, {name.rpartition("::")[2]: of for name, of in tests.items()}, launches


def test_outcomes_and_launches_are_counted(tmp_path):
    """On the real plugin: five tests, one of which runs the interpreter, one the op."""
    code, tests, launches = run_plugin(tmp_path, TESTS, 60)
    assert code == 1
    failed = dict.fromkeys(("test_wrong", "test_undone"), "failed")
    passed = dict.fromkeys(("test_values", "test_cuda"), "passed")
    assert tests == {**passed, "test_none": "skipped", **failed}
    counts = {"unfinished": 0, "passed": 2, "skipped": 1, "failed": 2}
    assert gpu_checks.count(tests) == counts
    assert launches.pop("cuda") == 1
    ((name, number),) = launches.items()
    assert name.startswith("interpreted: ") and name.endswith("::test_values") and number == 1
    assert gpu_checks.kept(tmp_path / "none") == ({}, Counter())


def test_the_device_runs_what_needs_it():
    names = {Path(file).name for file in gpu_checks.device_files()}
    left_out = set(gpu_checks.LEFT_OUT)
    assert {"test_triton_gpu.py", "test_cuda_gpu.py"} <= names and not names & left_out
    assert all((ROOT / "tests" / "triton" / name).exists() for name in left_out)


CALLS = "72 calls\n"
CLEAN = "========= ERROR SUMMARY: 0 errors\n"
HAZARDS = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("tool", "code", "output", "words"),
    [
        ("memcheck", 0, CALLS + CLEAN, None),
        ("racecheck", 0, CALLS + HAZARDS.format(2, 2), "summary of 0 errors is missing"),
        ("memcheck", 0, CALLS + CLEAN.replace(" 0 ", " 10 "), "summary of 0 errors is missing"),
        ("memcheck", 0, f"1{CALLS}{CLEAN}", "not every call was made"),
        ("initcheck", 1, CALLS + CLEAN, "ended with 1"),
        ("synccheck", None, "", "did not end in time"),
    ],
)
def test_a_sanitizer_that_saw_nothing_is_told(tool, code, output, words):
    reason = gpu_checks.found_nothing(tool, code, output, calls=72)
    assert reason is None if words is None else words in reason


def test_what_the_sanitizer_watches_runs(one_thread):
    calls = sanitized.CALLS["triton"]
    # Of memcheck at least 150 calls in all, of the other tools 40.
    assert len(calls) == sanitized.OF_TRITON >= 20
    assert len(calls) + len(sanitized.CALLS["cuda"]) >= 150
    for number, dtype in (calls[i] for i in (2, 4, 13, 15)):
        sanitized.check(number, dtype, "cpu", "triton")


@pytest.mark.skipif(extension.module is None, reason="needs the compiled extension")
def test_the_sanitizer_watches_every_cuda_kernel():
    kernels = Counter()
    for number, dtype in sanitized.CALLS["cuda"]:
        config, height, width, batch = sanitized.SHAPES[number]
        x = torch.empty((), dtype=dtype).expand(batch, config.in_channels, height, width)
        # Clips as in FoldedWeights without others.
        kernels[dtype, cuda_kernel(x, Block.of(config, (RELU6, RELU6, NO_CLIP)))] += 1
    for dtype in sanitized.DTYPES[:2]:
        assert {kernels[dtype, name] > 3 for name in ("patch", "tile", "generic")} == {True}
    assert kernels[torch.float32, "generic"] == len(sanitized.SHAPES)


def test_the_seeded_bug_compiles():
    signature = {"y": "*fp32", "length": "i32", "BLOCK": "constexpr"}
    source = ASTSource(sanitized.store_one_too_many, signature, constexprs={"BLOCK": 1024})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "st.global" in ptx
