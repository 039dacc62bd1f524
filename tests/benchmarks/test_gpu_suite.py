"""The GPU suite as far as a CPU goes: a dry run, and every way in which it must not pass."""

import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import blocks, checks, machine, peers, suite, timing
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu.part import Context, Failed
from benchmarks.machine import ROOT
from mnv2_kernels.block.config import inverted_residual_config
from mnv2_kernels.ops import extension
from mnv2_kernels.profiling.variants import plain

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu.suite", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path, time.monotonic() + 100, dry_run=True)


@pytest.fixture
def workload():
    """(providers' calls, workload) of a small block in fp16."""
    model = gpu_rows.rounded(harness.block_module(blocks.DRY_CONFIG), torch.float16)
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
    parts = "build,device,sanitizer,tune,blocks,network"
    done = run_command("--dry-run", "--out", str(tmp_path), "--parts", parts, "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{part:<10} ok" in done.stdout for part in parts.split(","))
    rows = {part: harness.load(f"gpu_{part}", tmp_path) for part in parts.split(",")}
    assert all(rows.values())
    every = [row for part in rows.values() for row in part]
    assert all(row["dry_run"] and row["commit"] == "abc" and row["gpu"] is None for row in every)
    assert {rows[part][0]["skipped"] for part in ("build", "sanitizer", "tune")} == {"no GPU"}
    assert rows["device"][0]["bytes_per_second"] > 0
    measured = {row["provider"]: row for row in rows["blocks"]}
    assert set(measured) == set(peers.BLOCK_PROVIDERS)
    assert measured.pop("fused-cuda")["error"] == "RuntimeError: needs a GPU"
    for name, row in measured.items():
        assert row["seconds"]["50%"] > 0 and 0 <= row["largest_error"] < 8e-3
        assert set(row["speedup"]) == set(measured) - {name}
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"]["50%"])
        assert row["peak_bytes"] > 0 and row["peak_bytes_computed"] > 0
    for name in ("fused", "fused-triton"):
        assert measured[name]["backend"] == "triton" and measured[name]["configuration"]["source"]
    network = {row["provider"]: row for row in rows["network"]}
    assert set(network) == set(peers.NETWORK_PROVIDERS)
    for name, row in network.items():
        if name in peers.BLOCK_PROVIDERS and name != "fused-cuda":
            assert row["images_per_second"] == pytest.approx(1 / row["seconds"]["50%"])
        else:
            assert row["error"] == "RuntimeError: needs a GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run_command("--out", str(tmp_path / "rows"))
    assert done.returncode == 2 and "there is no GPU" in done.stdout
    assert not (tmp_path / "rows").exists()


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        suite.parse(["--out", "x", "--parts", "blocks,speed"])
    assert "--parts must be of build, device, tests, sanitizer" in capsys.readouterr().err


def test_what_no_longer_fits_is_left_out(tmp_path, context):
    options = Namespace(out=tmp_path, dry_run=True, commit=None)
    became = suite.run_suite(["blocks", "network"], options, time.monotonic() + 5)
    assert became == dict.fromkeys(["blocks", "network"], "skipped: no time left")
    blocks.run_blocks(Context(tmp_path, time.monotonic() - 1, dry_run=True))
    (row,) = harness.load("gpu_blocks", tmp_path)
    assert (row["skipped"], row["block"], row["batch"]) == ("no time left", 1, 2)


def test_what_is_measured_is_not_measured_again(context, one_thread):
    blocks.run_blocks(context)
    rows = harness.load("gpu_blocks", context.out)
    blocks.run_blocks(context)
    assert harness.load("gpu_blocks", context.out) == rows
    assert not Context(context.out, 0).done("gpu_blocks", block=1), "a dry run is no result"
    assert context.done("gpu_blocks", block=1) and not context.done("gpu_blocks", block=2)
    late = {**rows[0], "error": "OutOfTime: no time left to build it"}
    context.keep([late])
    assert not context.done("gpu_blocks", block=1), "one provider is missing"


def test_a_part_that_fails_is_one_that_failed(context, monkeypatch, capsys):
    def fail(context):
        raise Failed("no good")

    monkeypatch.setitem(suite.PARTS, "device", suite.Part(fail, 1))
    assert suite.run_part("device", context) == 1
    assert "device: FAILED: no good" in capsys.readouterr().out


def test_a_provider_that_cannot_be_built_is_told():
    def slow(model, x):
        time.sleep(30)

    def broken(model, x):
        raise ValueError("no such\n  thing")

    providers = {"slow": slow, "broken": broken, "fine": lambda model, x: model}
    calls, errors = peers.build(providers, torch.nn.Identity(), torch.ones(1), seconds=lambda: 0.2)
    assert list(calls) == ["fine"]
    assert errors == {
        "slow": "OutOfTime: not built within 0 s",
        "broken": "ValueError: no such thing",
    }
    calls, errors = peers.build(providers, None, None, seconds=lambda: 0)
    assert not calls and set(errors.values()) == {"OutOfTime: no time left to build it"}


def test_wrong_results_are_not_timed(workload, context, one_thread):
    shared, model = workload
    right = peers.eager(model, shared.inputs[0])
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
    eager = peers.eager(model, shared.inputs[0])

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
    calls = {"eager": peers.eager(model, shared.inputs[0])}
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
    calls, errors = peers.build(
        {"fused": peers.fused}, plain(model), shared.inputs[0], seconds=lambda: 60
    )
    assert errors == {}
    with torch.inference_mode(), pytest.raises(AssertionError, match="must run on cuda or triton"):
        gpu_rows.check("fused", calls["fused"], shared)


def test_a_backend_does_not_pass_for_another(workload, one_thread):
    shared, model = workload
    calls, errors = peers.build(
        {"fused-triton": peers.fused_triton}, model, shared.inputs[0], seconds=lambda: 60
    )
    assert errors == {}
    with torch.inference_mode():
        assert gpu_rows.check("fused-triton", calls["fused-triton"], shared) < 8e-3
        with pytest.raises(AssertionError, match="blocks must run on cuda, triton ran"):
            gpu_rows.check("fused-cuda", calls["fused-triton"], shared)


def test_a_build_that_fails_says_what_the_compiler_said(context, monkeypatch):
    lines = ["a line"] * 50 + ["patch.cu(135): error: no instance", "more", "ninja: stopped"]
    printed = iter([(1, "\n".join(lines)), (None, "\n".join(lines[:50])), (0, ""), (1, "bad so")])
    monkeypatch.setattr(checks, "child", lambda *args, **variables: next(printed))
    real = replace(context, dry_run=False)
    with pytest.raises(Failed, match=r"it ended with 1:\npatch.cu\(135\): error: no instance$"):
        checks.run_build(real)
    with pytest.raises(Failed, match=r"its time was over:\n(a line\n){19}a line$"):
        checks.run_build(real)
    with pytest.raises(Failed, match="cannot be loaded:\nbad so"):
        checks.run_build(real)
    rows = harness.load("gpu_build", context.out)
    assert [row["exit_code"] for row in rows] == [1, None, 0] and rows[2]["loaded"] is False


def test_rows_say_which_kernel_ran():
    block = harness.block_module(inverted_residual_config(24, 24, 1, 6))
    x = torch.empty(2, 24, 56, 56, dtype=torch.float16)
    if extension.module is not None:
        said = blocks.ran_on("fused-cuda", block, x, 56)
        assert said == {"backend": "cuda", "kernel": "patch"}
    assert set(blocks.ran_on("fused-triton", block, x, 56)) == {"backend", "configuration"}
    assert blocks.ran_on("eager", block, x, 56) == {}


def test_inputs_are_taken_in_turns():
    assert timing.input_sets(200, 100) == 2
    assert timing.input_sets(400, 100) == 1
    assert timing.input_sets(1, 100) == 64
    assert timing.input_sets(10, 100, most=8) == 8
    seen = []
    call = timing.in_turns(seen.append, [1, 2, 3])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


def test_calls_take_turns():
    order = []
    calls = {name: (lambda n=name: (order.append(n), time.sleep(0.02))) for name in "ab"}
    samples = timing.interleave(calls, rounds=3, device=CPU, seconds=0.01, warmup=0)
    assert "".join(order) == "ab" + "ab" * 3
    assert all(len(s) == 3 and min(s) >= 0.02 for s in samples.values())
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        timing.interleave(calls, rounds=0, device=CPU)


def test_rates_of_ordinary_cores(monkeypatch):
    known = {"capability": "9.0", "multiprocessors": 132, "max_clock_mhz": "1980"}
    monkeypatch.setattr(machine, "gpu_facts", lambda: known)
    rates = machine.core_rates()
    assert rates["float16"] == pytest.approx(134e12, rel=0.005)
    assert rates["bfloat16"] == rates["float32"] == pytest.approx(67e12, rel=0.005)
    row = {"core_flops_per_second": rates, "bytes_per_second": 4e12}
    row["product_flops_per_second"] = {"float16": 7e14, "bfloat16": 8e14}
    assert machine.rates(row, torch.float16) == (4e12, 7e14, rates["float16"])
    known["max_clock_mhz"] = None
    assert machine.core_rates() is None


def test_distinct_blocks_are_the_17():
    found = harness.distinct_blocks()
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
        graph = timing.Graph(lambda x: x + 1, inputs)
        for y in graph.outputs:
            y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
    assert [y[0].item() for y in graph.outputs] == [1.0, 2.0, 3.0]


@needs_gpu
def test_events_time_the_device():
    x = torch.randn(4096, 4096, device="cuda")
    samples = timing.interleave({"product": lambda: x @ x}, rounds=3, device=x.device)
    assert all(1e-5 < sample < 0.1 for sample in samples["product"])
