"""The GPU suite as far as a CPU goes: a dry run, and every way in which it must not pass."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import blocks as gpu_blocks
from benchmarks.gpu import machine as gpu_machine
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.part import Context
from benchmarks.machine import ROOT
from mnv2_kernels.block.config import inverted_residual_config
from mnv2_kernels.ops import extension
from mnv2_kernels.profiling.variants import plain

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def suite(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu.suite", *arguments]
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


def test_a_dry_run_goes_all_the_way(tmp_path):
    parts = "build,device,sanitizer-cuda,tune,blocks,network"
    done = suite("--dry-run", "--out", str(tmp_path), "--parts", parts, "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{part:<10} ok" in done.stdout for part in parts.split(","))
    suites = [part.partition("-")[0] for part in parts.split(",")]
    rows = {suite: harness.load(f"gpu_{suite}", tmp_path) for suite in suites}
    assert all(rows.values())
    every = [row for part in rows.values() for row in part]
    assert all(row["dry_run"] and row["commit"] == "abc" and row["gpu"] is None for row in every)
    assert {rows[part][0]["skipped"] for part in ("build", "sanitizer", "tune")} == {"no GPU"}
    assert rows["device"][0]["bytes_per_second"] > 0
    measured = {row["provider"]: row for row in rows["blocks"]}
    assert set(measured) == set(gpu_peers.BLOCK_PROVIDERS)
    assert measured.pop("fused-cuda")["error"] == "RuntimeError: needs a GPU"
    for name, row in measured.items():
        assert row["seconds"]["50%"] > 0 and 0 <= row["largest_error"] < 8e-3
        assert set(row["speedup"]) == set(measured) - {name}
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"]["50%"])
        assert row["peak_bytes"] > 0 and row["peak_bytes_computed"] > 0
    for name in ("fused", "fused-triton"):
        assert measured[name]["backend"] == "triton" and measured[name]["configuration"]["source"]
    network = {row["provider"]: row for row in rows["network"]}
    assert set(network) == set(gpu_peers.NETWORK_PROVIDERS)
    for name, row in network.items():
        if name in ("planned", *gpu_peers.BLOCK_PROVIDERS) and name != "fused-cuda":
            assert row["images_per_second"] == pytest.approx(1 / row["seconds"]["50%"])
        else:
            assert row["error"] == "RuntimeError: needs a GPU"


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


@pytest.mark.serial
def test_times_of_graphs_are_those_of_one_call(workload, context, monkeypatch, one_thread):
    shared, model = workload
    three = replace(shared, inputs=shared.inputs * 3, truths=shared.truths * 3)
    eager = gpu_peers.eager(model, shared.inputs[0])

    def slow(x):
        time.sleep(0.1)
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
    for seconds in ("seconds", "seconds_called"):
        assert 0.1 <= found["unfused"][seconds]["50%"] < 0.28, "of one call, not of all three"
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
    with torch.inference_mode(), pytest.raises(AssertionError, match="must run on cuda or triton"):
        gpu_rows.check("fused", calls["fused"], shared)


def test_a_backend_does_not_pass_for_another(workload, one_thread):
    shared, model = workload
    calls, errors = gpu_peers.build(
        {"fused-triton": gpu_peers.fused_triton}, model, shared.inputs[0], seconds=lambda: 60
    )
    assert errors == {}
    with torch.inference_mode():
        assert gpu_rows.check("fused-triton", calls["fused-triton"], shared) < 8e-3
        with pytest.raises(AssertionError, match="blocks must run on cuda, triton ran"):
            gpu_rows.check("fused-cuda", calls["fused-triton"], shared)


def test_rows_say_which_kernel_ran():
    block = harness.block_module(inverted_residual_config(24, 24, 1, 6))
    x = torch.empty(2, 24, 56, 56, dtype=torch.float16)
    if extension.module is not None:
        said = gpu_blocks.ran_on("fused-cuda", block, x, 56)
        assert said == {"backend": "cuda", "kernel": "patch"}
    assert set(gpu_blocks.ran_on("fused-triton", block, x, 56)) == {"backend", "configuration"}
    assert gpu_blocks.ran_on("eager", block, x, 56) == {}


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
