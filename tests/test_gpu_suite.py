"""The GPU suite as far as a CPU goes: a dry run, and every way in which it must not pass."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import (
    gpu_blocks,
    gpu_checks,
    gpu_machine,
    gpu_peers,
    gpu_rows,
    gpu_suite,
    gpu_timing,
    harness,
    sanitized,
)
from benchmarks.gpu_part import Context, Failed
from benchmarks.machine import ROOT
from mnv2_kernels.variants import plain

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def suite(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path, time.monotonic() + 100, dry_run=True)


@pytest.fixture
def workload():
    """(providers' calls, workload) of a small block in fp16."""
    model = gpu_rows.rounded(harness.block_module(gpu_blocks.DRY_CONFIG), torch.float16)
    x = harness.image(8, 6, 2).half()
    return gpu_rows.Workload(
        labels={"suite": "gpu_blocks", "block": 1},
        inputs=[x],
        truths=gpu_rows.truths(model, [x]),
        tolerance=gpu_rows.BLOCK_TOLERANCE,
        floors={"fused": 1e-6, "folded": 2e-6, "eager": 3e-6},
        rounds=2,
    ), model


@pytest.mark.timeout(180)
def test_a_dry_run_goes_all_the_way(tmp_path):
    parts = "device,sanitizer,tune,blocks,network"
    done = suite("--dry-run", "--out", str(tmp_path), "--parts", parts, "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{part:<10} ok" in done.stdout for part in parts.split(","))
    rows = {part: harness.load(f"gpu_{part}", tmp_path) for part in parts.split(",")}
    assert all(rows.values())
    every = [row for part in rows.values() for row in part]
    assert all(row["dry_run"] and row["commit"] == "abc" and row["gpu"] is None for row in every)
    assert rows["sanitizer"][0]["skipped"] == rows["tune"][0]["skipped"] == "no GPU"
    assert rows["device"][0]["bytes_per_second"] > 0
    measured = {row["provider"]: row for row in rows["blocks"]}
    assert set(measured) == {"fused", "unfused", "folded", "eager"}
    for name, row in measured.items():
        assert row["seconds"]["50%"] > 0 and 0 <= row["largest_error"] < 8e-3
        assert set(row["speedup"]) == set(measured) - {name}
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"]["50%"])
        assert row["peak_bytes"] > 0 and row["peak_bytes_computed"] > 0
    assert measured["fused"]["configuration"]["source"]
    network = {row["provider"]: row for row in rows["network"]}
    assert set(network) == set(gpu_peers.NETWORK_PROVIDERS)
    for name, row in network.items():
        if name in gpu_peers.BLOCK_PROVIDERS:
            assert row["images_per_second"] == pytest.approx(1 / row["seconds"]["50%"])
        else:
            assert row["error"] == "RuntimeError: needs a GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = suite("--out", str(tmp_path / "rows"))
    assert done.returncode == 2 and "there is no GPU" in done.stdout
    assert not (tmp_path / "rows").exists()


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.parse(["--out", "x", "--parts", "blocks,speed"])
    assert "--parts must be of device, tests, sanitizer" in capsys.readouterr().err


def test_what_no_longer_fits_is_left_out(tmp_path, context):
    options = Namespace(out=tmp_path, dry_run=True, commit=None)
    became = gpu_suite.run_suite(["blocks", "network"], options, time.monotonic() + 5)
    assert became == dict.fromkeys(["blocks", "network"], "skipped: no time left")
    gpu_blocks.run_blocks(Context(tmp_path, time.monotonic() - 1, dry_run=True))
    (row,) = harness.load("gpu_blocks", tmp_path)
    assert (row["skipped"], row["block"], row["batch"]) == ("no time left", 1, 2)


def test_what_is_measured_is_not_measured_again(context, one_thread):
    gpu_blocks.run_blocks(context)
    rows = harness.load("gpu_blocks", context.out)
    gpu_blocks.run_blocks(context)
    assert harness.load("gpu_blocks", context.out) == rows
    assert not Context(context.out, 0).done("gpu_blocks", block=1), "a dry run is no result"
    assert context.done("gpu_blocks", block=1) and not context.done("gpu_blocks", block=2)
    late = {**rows[0], "error": "OutOfTime: no time left to build it"}
    context.keep([late])
    assert not context.done("gpu_blocks", block=1), "one provider is missing"


def test_a_part_that_fails_is_one_that_failed(context, monkeypatch, capsys):
    def fail(context):
        raise Failed("no good")

    monkeypatch.setitem(gpu_suite.PARTS, "device", gpu_suite.Part(fail, 1))
    assert gpu_suite.run_part("device", context) == 1
    assert "device: FAILED: no good" in capsys.readouterr().out


def test_a_child_is_ended_with_its_children():
    inner = "import subprocess, sys, time; subprocess.run(['sleep', '60']); print('late')"
    start = time.monotonic()
    code, output = gpu_checks.child([sys.executable, "-c", inner], 0.5)
    assert code is None and "late" not in output and time.monotonic() - start < 20
    code, output = gpu_checks.child([sys.executable, "-c", "print('x'); raise SystemExit(3)"], 30)
    assert (code, output) == (3, "x\n")


GOOD = {"passed": 3, "failed": 0, "skipped": 1}


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
        (None, GOOD, {"device": 5}, "did not end in time"),
    ],
)
def test_tests_that_prove_nothing_are_told(code, counts, launches, words):
    found = gpu_checks.complaints(code, counts, Counter(launches))
    assert found == [] if words is None else words in "; ".join(found)


def test_outcomes_and_launches_are_counted(tmp_path):
    """On the real plugin and a real report: three tests, one of which runs the interpreter."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "from benchmarks import sanitized\n"
        "def test_values(): sanitized.check(13, 'cpu')\n"
        "def test_wrong(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_none(): pass\n"
    )
    report = tmp_path / "junit.xml"
    code, output = gpu_checks.child(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
        + ["-p", "benchmarks.device_tests", f"--junitxml={report}", str(tmp_path)],
        60,
        MNV2_DEVICE_TESTS=str(tmp_path),
    )
    assert code == 1, output
    counts, failures = gpu_checks.outcomes(report)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert [name.rpartition("::")[2] for name in failures] == ["test_wrong"]
    (path,) = tmp_path.glob("*.json")
    launches = json.loads(path.read_text())
    ((name, count),) = launches.items()
    assert name.startswith("interpreted: ") and name.endswith("::test_values") and count == 1
    assert gpu_checks.outcomes(tmp_path / "none.xml") == (dict.fromkeys(counts, 0), [])


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


def test_a_provider_that_cannot_be_built_is_told():
    def slow(model, x):
        time.sleep(30)

    def broken(model, x):
        raise ValueError("no such\n  thing")

    providers = {"slow": slow, "broken": broken, "fine": lambda model, x: model}
    calls, errors = gpu_peers.build(
        providers, torch.nn.Identity(), torch.ones(1), seconds=lambda: 0.2
    )
    assert list(calls) == ["fine"]
    assert errors == {
        "slow": "OutOfTime: not built within 0 s",
        "broken": "ValueError: no such thing",
    }
    calls, errors = gpu_peers.build(providers, None, None, seconds=lambda: 0)
    assert not calls and set(errors.values()) == {"OutOfTime: no time left to build it"}


def test_wrong_results_are_not_timed(workload, context, one_thread):
    shared, model = workload
    right = gpu_peers.eager(model, shared.inputs[0])
    calls = {"eager": right, "folded": lambda x: right(x) * 1.02, "unfused": lambda x: right(x)[:1]}
    rows = gpu_rows.measure(context, calls, {"fused": "not built"}, shared, in_graph=True)
    errors = {row["provider"]: row.get("error") for row in rows}
    assert errors["eager"] is None and errors["fused"] == "not built"
    assert "largest error must be at most" in errors["folded"]
    assert "result must be (2, 8, 6, 6), got (1, 8, 6, 6)" in errors["unfused"]


class CpuGraph:
    """A graph of nothing: replays by calling again."""

    def __init__(self, call, inputs):
        if getattr(call, "no_capture", False):
            raise RuntimeError("cannot be captured")
        self.call, self.inputs = call, inputs
        self.outputs = [call(x).clone() for x in inputs]

    def replay(self):
        for y, x in zip(self.outputs, self.inputs, strict=True):
            y.copy_(self.call(x))


def test_times_of_graphs_are_those_of_one_call(workload, context, monkeypatch, one_thread):
    shared, model = workload
    three = replace(shared, inputs=shared.inputs * 3, truths=shared.truths * 3)
    eager = gpu_peers.eager(model, shared.inputs[0])

    def slow(x):
        time.sleep(0.02)
        return eager(x)

    def stubborn(x):
        return eager(x)

    stubborn.no_capture = True
    monkeypatch.setattr(gpu_rows, "Graph", CpuGraph)
    monkeypatch.setattr(Context, "device", CPU)
    calls = {"unfused": slow, "eager": eager, "folded": stubborn}
    rows = gpu_rows.measure(replace(context, dry_run=False), calls, {}, three, in_graph=True)
    found = {row["provider"]: row for row in rows}
    assert list(found) == ["unfused", "eager", "folded"]
    assert found["folded"]["error"] == "in a CUDA graph: RuntimeError: cannot be captured"
    assert 0.02 <= found["unfused"]["seconds"]["50%"] < 0.055
    assert 0.02 <= found["unfused"]["seconds_called"]["50%"] < 0.055
    assert found["eager"]["speedup"]["unfused"] > 5
    assert set(found["eager"]["speedup_called"]) == {"unfused", "folded"}
    assert found["eager"]["input_sets"] == 3


def test_what_a_graph_leaves_unwritten_is_wrong(workload, context, monkeypatch, one_thread):
    class Forgetful(CpuGraph):
        def replay(self):
            pass

    shared, model = workload
    monkeypatch.setattr(gpu_rows, "Graph", Forgetful)
    errors = {}
    calls = {"eager": gpu_peers.eager(model, shared.inputs[0])}
    with torch.inference_mode():
        assert gpu_rows.replays(calls, shared, errors) == {}
    assert "got nan" in errors["eager"]


def test_nan_is_wrong(workload):
    shared, _ = workload
    y = shared.truths[0].half()
    assert gpu_rows.error_of(y, shared.truths[0], 8) < 1e-3
    y[1, 2, 3, 4] = float("nan")
    with pytest.raises(AssertionError, match="got nan"):
        gpu_rows.error_of(y, shared.truths[0], 8)


def test_plain_layers_do_not_pass_for_the_kernel(workload, one_thread):
    shared, model = workload
    calls, errors = gpu_peers.build(
        {"fused": gpu_peers.fused}, plain(model), shared.inputs[0], seconds=lambda: 60
    )
    assert errors == {}
    with torch.inference_mode(), pytest.raises(AssertionError, match="must run on triton"):
        gpu_rows.check("fused", calls["fused"], shared)


def test_inputs_are_taken_in_turns():
    assert gpu_timing.input_sets(200, 100) == 2
    assert gpu_timing.input_sets(400, 100) == 1
    assert gpu_timing.input_sets(1, 100) == 64
    assert gpu_timing.input_sets(10, 100, most=8) == 8
    seen = []
    call = gpu_timing.in_turns(seen.append, [1, 2, 3])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


def test_calls_take_turns():
    order = []
    calls = {name: (lambda n=name: (order.append(n), time.sleep(0.02))) for name in "ab"}
    samples = gpu_timing.interleave(calls, rounds=3, device=CPU, seconds=0.01, warmup=0)
    assert "".join(order) == "ab" + "ab" * 3
    assert all(len(s) == 3 and min(s) >= 0.02 for s in samples.values())
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        gpu_timing.interleave(calls, rounds=0, device=CPU)


def test_rates_of_ordinary_cores(monkeypatch):
    known = {"capability": "9.0", "multiprocessors": 132, "max_clock_mhz": "1980"}
    monkeypatch.setattr(gpu_machine, "gpu_facts", lambda: known)
    rates = gpu_machine.core_rates()
    assert rates["float16"] == pytest.approx(134e12, rel=0.005)
    assert rates["bfloat16"] == rates["float32"] == pytest.approx(67e12, rel=0.005)
    row = {"core_flops_per_second": rates, "bytes_per_second": 4e12}
    row["product_flops_per_second"] = {"float16": 7e14, "bfloat16": 8e14}
    assert gpu_machine.rates(row, torch.float16) == (4e12, 7e14, rates["float16"])
    known["max_clock_mhz"] = None
    assert gpu_machine.core_rates() is None


def test_distinct_blocks_are_the_17():
    found = gpu_blocks.distinct_blocks()
    assert sorted(number for numbers in found.values() for number in numbers) == list(range(1, 18))
    assert [numbers for numbers in found.values() if len(numbers) > 1] == [
        [5, 6],
        [8, 9, 10],
        [12, 13],
        [15, 16],
    ]


@needs_gpu
def test_a_graph_holds_one_result_an_input():
    inputs = [torch.full((4,), float(i), device="cuda") for i in range(3)]
    with torch.inference_mode():
        graph = gpu_timing.Graph(lambda x: x + 1, inputs)
        for y in graph.outputs:
            y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
    assert [y[0].item() for y in graph.outputs] == [1.0, 2.0, 3.0]


@needs_gpu
def test_events_time_the_device():
    x = torch.randn(4096, 4096, device="cuda")
    samples = gpu_timing.interleave({"product": lambda: x @ x}, rounds=3, device=x.device)
    assert all(1e-5 < sample < 0.1 for sample in samples["product"])
