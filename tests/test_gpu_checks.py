"""What must not pass for a test or a sanitized run on the GPU, and what is kept of one."""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import gpu_checks, harness, sanitized
from benchmarks.gpu_part import Context, Failed
from benchmarks.machine import ROOT


def test_a_child_is_ended_with_its_children():
    inner = "import subprocess, sys, time; subprocess.run(['sleep', '60']); print('late')"
    start = time.monotonic()
    code, output = gpu_checks.child([sys.executable, "-c", inner], 0.5)
    assert code is None and "late" not in output and time.monotonic() - start < 20
    code, output = gpu_checks.child([sys.executable, "-c", "print('x'); raise SystemExit(3)"], 30)
    assert (code, output) == (3, "x\n")


GOOD = {"passed": 3, "failed": 0, "skipped": 1, "unfinished": 0}


@pytest.mark.parametrize(
    ("code", "counts", "launches", "words"),
    [
        (0, GOOD, {"device": 5}, None),
        (0, GOOD, {"device": 5, "interpreted: tests/a.py::test_interpreter": 2}, None),
        (0, GOOD, {"device": 5, "interpreted: tests/a.py::test_values": 2}, "the interpreter ran"),
        (0, GOOD, {}, "no kernel ran on the device"),
        (0, GOOD | {"passed": 0}, {"device": 5}, "none passed"),
        (1, GOOD | {"failed": 2}, {"device": 5}, "2 failed"),
        (5, GOOD, {"device": 5}, "pytest ended with 5"),
        (None, GOOD, {"device": 5}, "ended: their time was over"),
    ],
)
def test_tests_that_prove_nothing_are_told(code, counts, launches, words):
    found = gpu_checks.complaints(code, counts, Counter(launches))
    assert found == [] if words is None else words in "; ".join(found)


TESTS = """
import pytest
from benchmarks import sanitized
def test_values(): sanitized.check(13, 'cpu')
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
    command += ["-p", "benchmarks.device_tests", *options, str(folder)]
    code, _ = gpu_checks.child(command, seconds, MNV2_DEVICE_TESTS=str(folder))
    tests, launches = gpu_checks.kept(folder)
    return code, {name.rpartition("::")[2]: of for name, of in tests.items()}, launches


def test_outcomes_and_launches_are_counted(tmp_path):
    """On the real plugin: four tests, one of which runs the interpreter."""
    code, tests, launches = run_plugin(tmp_path, TESTS, 60)
    assert code == 1
    failed = dict.fromkeys(("test_wrong", "test_undone"), "failed")
    assert tests == {"test_values": "passed", "test_none": "skipped", **failed}
    counts = {"unfinished": 0, "passed": 1, "skipped": 1, "failed": 2}
    assert gpu_checks.count(tests) == counts
    ((name, number),) = launches.items()
    assert name.startswith("interpreted: ") and name.endswith("::test_values") and number == 1
    assert gpu_checks.kept(tmp_path / "none") == ({}, Counter())


def test_what_is_known_outlives_a_process_that_is_killed(tmp_path):
    source = TESTS + "def test_killed(): import os; os.kill(os.getpid(), 9)\n"
    code, tests, launches = run_plugin(tmp_path, source, 60)
    assert code == -9 and sum(launches.values()) == 1
    assert tests["test_values"] == "passed" and tests["test_killed"] == "unfinished"


def test_the_row_of_a_run_that_is_ended_says_so(tmp_path, monkeypatch):
    def ended(command, seconds, **variables):
        assert seconds == pytest.approx(100 - gpu_checks.END_SECONDS, abs=1)
        folder = Path(variables["MNV2_DEVICE_TESTS"])
        (folder / "1.outcomes").write_text("unfinished a::b\npassed a::b\nunfinished a::c[x y]\n")
        (folder / "1.json").write_text('{"device": 7}')
        return None, "the end"

    monkeypatch.setattr(gpu_checks, "child", ended)
    context = Context(tmp_path, time.monotonic() + 100)
    with pytest.raises(Failed, match="ended: their time was over"):
        gpu_checks.run_tests(context)
    (row,) = harness.load("gpu_tests", tmp_path)
    assert (row["passed"], row["failed"], row["device_launches"]) == (1, 0, 7)
    assert row["unfinished_tests"] == ["a::c[x y]"] and row["output"] == "the end"


def test_the_device_runs_what_needs_it():
    names = {Path(file).name for file in gpu_checks.device_files()}
    left_out = set(gpu_checks.LEFT_OUT)
    assert "test_triton_gpu.py" in names and not names & left_out
    assert all((ROOT / "tests" / name).exists() for name in left_out)


CALLS = f"{len(sanitized.SHAPES)} calls\n"
CLEAN = "========= ERROR SUMMARY: 0 errors\n"
HAZARDS = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("tool", "code", "output", "words"),
    [
        ("memcheck", 0, CALLS + CLEAN, None),
        ("racecheck", 0, CALLS + HAZARDS.format(0, 0), None),
        ("racecheck", 0, CALLS + HAZARDS.format(2, 2), "summary of 0 errors is missing"),
        ("memcheck", 0, CALLS, "summary of 0 errors is missing"),
        ("memcheck", 0, CALLS + CLEAN.replace(" 0 ", " 10 "), "summary of 0 errors is missing"),
        ("memcheck", 0, CLEAN, "not every call was made"),
        ("initcheck", 1, CALLS + CLEAN, "ended with 1"),
        ("synccheck", None, "", "did not end in time"),
    ],
)
def test_a_sanitizer_that_saw_nothing_is_told(tool, code, output, words):
    reason = gpu_checks.found_nothing(tool, code, output)
    assert reason is None if words is None else words in reason


def test_the_seeded_bug_must_be_found():
    report = "========= Invalid __global__ write of size 4 bytes\n"
    assert gpu_checks.found_the_bug("memcheck", 1, report) is None
    assert "must be reported" in gpu_checks.found_the_bug("memcheck", 1, "Error: no device")
    assert "got 0" in gpu_checks.found_the_bug("memcheck", 0, report)
    assert "got None" in gpu_checks.found_the_bug("memcheck", None, report)


def test_what_the_sanitizer_watches_runs(one_thread):
    assert len(sanitized.SHAPES) >= 20
    for number in (2, 4, 13, 15):
        sanitized.check(number, "cpu")


def test_the_seeded_bug_compiles():
    signature = {"y": "*fp32", "length": "i32", "BLOCK": "constexpr"}
    source = ASTSource(sanitized.store_one_too_many, signature, constexprs={"BLOCK": 1024})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "st.global" in ptx
