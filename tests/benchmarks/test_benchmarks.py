"""The benchmarks work: one tiny block measured, one file run as users run it, tables from rows."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import harness, machine
from benchmarks.cpu import bench_widths
from benchmarks.markdown import fill
from benchmarks.peers import turns
from benchmarks.report import cpu_tables, headline, plot, summary
from mnv2_kernels import plan
from mnv2_kernels.block import cost
from mnv2_kernels.block.config import inverted_residual_config
from mnv2_kernels.profiling import timing

TINY = inverted_residual_config(8, 8, 1, 6)
needs_extension = pytest.mark.skipif(timing._C is None, reason="needs the compiled extension")


@pytest.fixture(scope="module")
def tiny():
    """(module, x, result in float64) of a block of a few thousand multiply-adds."""
    module = harness.block_module(TINY)
    x = harness.image(8, 6, 2)
    return module, x, harness.truth(module, x)


def measure(tiny, **kwargs):
    module, x, expected = tiny
    return harness.measure(
        {name: (lambda m=m: m(x)) for name, m in harness.providers(module).items()},
        x=x,
        expected=expected,
        flops=cost.flops(TINY, 6, 6, batch=2),
        threads=1,
        rounds=2,
        suite="block",
        **kwargs,
    )


def test_rows_of_a_measurement(tiny):
    threads = torch.get_num_threads()
    rows = measure(tiny, block=1, computed_peaks={"fused": 1234})
    assert torch.get_num_threads() == threads
    assert [row["provider"] for row in rows] == ["fused", "folded", "eager"]
    for row in rows:
        assert json.loads(json.dumps(row)) == row
        assert 0 < row["seconds"]["25%"] <= row["seconds"]["50%"] <= row["seconds"]["75%"]
        assert row["gflops"] == pytest.approx(
            cost.flops(TINY, 6, 6, batch=2) / row["seconds"]["50%"] / 1e9
        )
        assert set(row["speedup"]) == {"fused", "folded", "eager"} - {row["provider"]}
        assert 0 <= row["largest_error"] < 1e-5
        assert row["peak_bytes"] >= 2 * tiny[1].nbytes
        assert (row["batch"], row["dtype"], row["threads"]) == (2, "float32", 1)
    assert [row["peak_bytes_computed"] for row in rows] == [1234, None, None]
    has_peak = timing._C is not None
    assert all((row["share_of_fma_peak"] is not None) == has_peak for row in rows)


def test_a_wrong_result_is_not_timed(tiny):
    module, x, expected = tiny
    with pytest.raises(AssertionError, match="largest error must be at most 0.0001, got"):
        measure((module, x, expected * 1.01))
    with pytest.raises(AssertionError, match="got nan"):
        measure((module, x, expected * float("nan")))


@needs_extension
def test_a_benchmark_file_runs_as_users_run_it(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/cpu/bench_block.py"]
    done = subprocess.run(
        [*command, "-k", "test_block and 1-1-17", "--benchmark-disable", f"--results={tmp_path}"],
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "geometric mean" in done.stdout
    rows = harness.load("block", tmp_path)
    assert {row["provider"] for row in rows} >= {"fused"}
    assert all(row["block"] == 17 and row["config"] == "160x960x320-s1-k3" for row in rows)


def synthetic_rows() -> list[harness.Row]:
    """A complete run on a machine of 100 GFLOP/s; block n takes n ms fused, 3 n ms folded."""
    facts = {**machine.facts(), "date": "2026-01-02T00:00:00+00:00", "cpu": "test"}
    rows = []
    for number, (config, size) in enumerate(harness.BLOCKS, 1):
        for provider, factor in (("fused", 1), ("folded", 3), ("eager", 4)):
            times = {"fused": 1, "folded": 3, "eager": 4}
            row = {
                "suite": "block",
                "block": number,
                "config": config.name,
                "resolution": size,
                "provider": provider,
                "batch": 1,
                "threads": 1,
                "seconds": {"50%": number * factor / 1000},
                "gflops": 80 / factor,
                "share_of_fma_peak": 0.8 / factor if number > 1 else 0.5 / factor,
                "speedup": {n: t / factor for n, t in times.items() if n != provider},
                "peak_bytes": factor * 2**20,
            }
            rows.append({**facts, **row})
    network = {"suite": "network", "model": "net", "provider": "fused", "threads": 1, "batch": 8}
    network |= {"seconds": {"50%": 0.04}, "gflops": 60.0, "share_of_fma_peak": 0.6}
    rows.append({**facts, **network, "speedup": {"folded": 4.5}})
    for batch in (1, 8):
        memory = {"suite": "memory", "model": "net", "provider": "fused", "batch": batch}
        peaks = {"peak_bytes": (batch + 1) * 2**20, "peak_bytes_computed": batch * 2**20}
        rows.append({**facts, **memory, **peaks})
    return rows


def test_the_bound_is_the_most_of_the_run():
    def row(isa, threads, peak):
        return {"instruction_set": isa, "threads": threads, "gflops": 50.0, "fma_peak_gflops": peak}

    rows = [row("a", 1, 80.0), row("a", 1, 100.0), row("a", 2, 190.0), row("b", 1, None)]
    bounded = summary.with_common_bound(rows)
    assert [r["fma_peak_gflops"] for r in bounded] == [100.0, 100.0, 190.0, None]
    assert [r.get("share_of_fma_peak") for r in bounded] == [0.5, 0.5, 50 / 190, None]


def test_tables_and_figures_come_from_the_newest_rows(tmp_path):
    rows = synthetic_rows()
    old = {**rows[0], "seconds": {"50%": 9.0}, "date": "2026-01-01T00:00:00+00:00"}
    elsewhere = {**rows[0], "cpu": "other", "date": "2025-12-31T00:00:00+00:00"}
    harness.append([old, elsewhere, *rows], tmp_path)
    assert len(harness.load("block", tmp_path)) == 17 * 3 + 2
    made = cpu_tables.sections(results := cpu_tables.latest(tmp_path))
    block = made["blocks"].table.splitlines()
    assert len(block) == 2 + 17
    assert block[2].endswith("| 112x112 | 1000 | 80 | 50% | 3.00x | 4.00x | 1.00 | 3.00 |")
    assert "| 153.00 | 78% | 3.00x | 4.00x |" in made["block-runs"].table
    assert "| 5.00 | 60% | 4.50x |" in made["network"].table
    assert "| 9.00 | 8.00 | 1.00 |" in made["memory"].table
    assert [path.name for path in plot.live_memory(results["memory"], tmp_path)] == []
    assert [path.name for path in plot.figures(results, tmp_path)] == [
        "share_of_peak.svg",
        "peak_memory.svg",
    ]


def peer_rows() -> list[harness.Row]:
    """A peer of 2 ms a block and an image where the plan takes 1, and half of that in bfloat16."""
    facts = {**machine.facts(), "date": "2026-01-02T00:00:00+00:00", "cpu": "test"}
    facts["instruction_set"] = "avx2"
    times = {("planned", "float32"): 1, ("slow", "float32"): 2, ("half", "bfloat16"): 0.5}
    network = "torchvision mobilenet_v2"
    workloads = [{"model": network, "batch": batch} for batch in (1, 8)]
    workloads.append({"block": 3, "config": "24x144x24-s1-k3", "batch": 1})
    rows = []
    for workload in workloads:
        for (provider, dtype), time in times.items():
            row = {"suite": "peers", "provider": provider, "dtype": dtype, "threads": 1, **workload}
            row["seconds"] = {"50%": workload["batch"] * time / 1000}
            row["share_of_fma_peak"] = 0.8 / time
            row["speedup"] = {n: t / time for (n, _), t in times.items() if n != provider}
            rows.append({**facts, **row})
            if workload.get("model") == network:
                run = int(workload["batch"] * time * 2**20)
                memory = {"suite": "peers-memory", "load_bytes": 10 * 2**20, "run_bytes": run}
                rows.append({**facts, **row, **memory})
    return rows


def test_tables_and_a_figure_of_peers(tmp_path):
    rows = peer_rows()
    # A later run with the plan alone takes nothing away.
    later = {**rows[0], "speedup": {}, "date": "2026-01-03T00:00:00+00:00"}
    held_back = {**rows[0], "instruction_set": "default", "seconds": {"50%": 9.0}}
    harness.append([*rows, later, held_back], tmp_path)
    made = cpu_tables.sections(results := cpu_tables.latest(tmp_path))
    assert made["peers-network"].table.splitlines() == [
        "| provider | dtype | 1 thread, batch 1 | 1 thread, batch 8 |",
        "| --- | --- | ---: | ---: |",
        "| planned | float32 | 1.00 (80%) | 1.00 (80%) |",
        "| slow | float32 | 2.00 (2.00x, 40%) | 2.00 (2.00x, 40%) |",
        "| half | bfloat16 | 0.50 (0.50x, 160%) | 0.50 (0.50x, 160%) |",
    ]
    head, _, *blocks = made["peers-blocks"].table.splitlines()
    assert head.endswith("| us, planned | of FMA peak | slow |")
    assert blocks == ["| 3 | 24x144x24-s1-k3 | 1000 | 80% | 2.00x (40%) |"]
    assert made["peers-relatives"].table == ""
    memory = made["peers-memory"].table.splitlines()
    assert memory[2] == "| planned | float32 | 10.0 | 1.0 | 10.0 | 8.0 | 1.00 |"
    assert memory[4] == "| half | bfloat16 | 10.0 | 0.5 | 10.0 | 4.0 | 0.50 |"
    (path,) = plot.peer_figures(results, tmp_path)
    assert path.read_bytes().count(b"<path") > 6


def test_a_table_of_relatives(tmp_path):
    rows = peer_rows()
    of_two = [row for row in rows if row.get("batch") == 8 and row["suite"] == "peers"]
    relatives = [{**row, "model": "timm lcnet_050", "threads": t} for row in of_two for t in (1, 2)]
    harness.append([*rows, *relatives], tmp_path)
    made = cpu_tables.sections(cpu_tables.latest(tmp_path))
    assert made["peers-relatives"].table.splitlines() == [
        "| network | batch | threads | ms an image, planned | of FMA peak | slow |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| timm lcnet_050 | 8 | 1 | 1.00 | 80% | 2.00x (40%) |",
        "| timm lcnet_050 | 8 | 2 | 1.00 | 80% | 2.00x (40%) |",
    ]
    # The tables of MobileNetV2 have none of them.
    assert "2 threads" not in made["peers-network"].table


def test_tables_say_where_their_rows_come_from(tmp_path):
    rows = [row for row in peer_rows() if row["suite"] == "peers" and "model" in row]
    for row in rows:
        row |= {"commit": "abc" if row["provider"] == "planned" else "def", "cores": 1}
        row["versions"] = {"runtime": "1.0"} if row["provider"] == "slow" else {}
    harness.append(rows, tmp_path)
    made = cpu_tables.sections(cpu_tables.latest(tmp_path))
    text = " ".join(str(made["peers-network"]).split())
    assert "Measured on test, 1 core, L1d" in text
    runs = "commits abc on 2026-01-02 (planned), def on 2026-01-02 (slow, half)"
    assert f"{runs}. With runtime 1.0." in text
    # What has no rows is left out, heading and all.
    assert [name for name, section in made.items() if str(section)] == ["peers-network"]


def test_the_first_figures_are_those_of_the_tables(tmp_path):
    facts = {"threads": 1, "batch": 1, "cpu": "Test CPU (model 1)", "instruction_set": "avx2"}
    facts |= {"dtype": "float32", "resolution": 224}
    facts["model"] = "torchvision mobilenet_v2"
    names = {"folded": 4, "fused": 2, "planned": 1, "litert": 3}
    times = [{**facts, "provider": n, "seconds": {"50%": t / 1000}} for n, t in names.items()]
    peaks = [{**facts, "provider": n, "peak_bytes": t * 2**20} for n, t in names.items()]
    text = headline.headline({"peers": times, "memory": peaks})
    assert "one core of a Test CPU (AVX2)" in text
    assert "2.00 ms with `mk.fuse`, 1.00 ms with `mk.plan`" in text
    assert "channels_last**: 4.00 ms with batch norm folded into the convolutions." in text
    assert "4.00 MiB in PyTorch, 2.00 MiB with `mk.fuse`, 1.00 MiB with `mk.plan`" in text
    assert "LiteRT 3.00 ms." in text
    assert headline.headline({"peers": times[:2], "memory": peaks}) == ""
    (path,) = plot.live_memory(peaks, tmp_path)
    assert "mk.fuse: peak 2.00 MiB" in path.read_text()


def test_only_what_is_between_markers_is_replaced():
    text = "a\n<!-- begin:one -->\nold\n<!-- end:one -->\nb\n<!-- begin:two --><!-- end:two -->\n"
    filled = fill(text, {"one": "new", "three": "unused"})
    assert filled == text.replace("old", "new")
    assert fill(filled, {"one": "new"}) == filled
    with pytest.raises(ValueError, match="must hold <!-- end:x --> after <!-- begin:x -->"):
        fill("<!-- begin:x -->", {})


@needs_extension
@pytest.mark.parametrize("dtype", bench_widths.PROVIDERS)
def test_rows_of_widths(dtype, monkeypatch):
    """In made-up time: the small one always takes 2 s, the other 5 s; none of it is lost."""
    sizes = [(0.35, 32), (0.5, 48)]
    small, reference = sizes
    seconds = iter([2.0, 5.0] * 2)
    monkeypatch.setattr(bench_widths, "_turn", lambda call, _: (next(seconds), 0.0))
    monkeypatch.setattr(bench_widths, "_peak_turn", lambda threads: (0.01, 0.0))
    monkeypatch.setattr(bench_widths, "take_turns", in_order)
    rows = bench_widths.measure(
        sizes, dtype=dtype, batch=2, rounds=2, tolerance=0.0, reference=reference
    )
    flops = {size: 2 * cost.network_multiply_adds(*size, batch=2) for size in sizes}
    for size, row, time in zip(sizes, rows, (2, 5), strict=True):
        assert (row["width"], row["resolution"]) == size
        assert row["seconds"]["50%"] == time
        assert row["gflops"] == pytest.approx(flops[size] / time / 1e9)
        assert row["share_of_fma_peak"] == pytest.approx(row["gflops"] / 0.01)
        assert 0 < row["error"] < (1e-5 if dtype == torch.float32 else 0.1)
        assert row["provider"] == bench_widths.PROVIDERS[dtype]
        assert (row["rounds"], row["dropped"], row["batch"]) == (2, 0, 2)
    over = rows[0]["gflops"] / rows[1]["gflops"]
    assert rows[0]["share_over_reference"] == pytest.approx(over)
    assert rows[1]["share_over_reference"] == 1


def in_order(calls, *, rounds, tolerance, pause):
    """`take_turns` that begins with the same one in every round."""
    taken = [{name: call() for name, call in calls.items()} for _ in range(rounds)]
    return {name: turns.Samples([found[name][0] for found in taken]) for name in calls}


@needs_extension
def test_a_wrong_or_lost_size_has_no_rows(monkeypatch):
    size = (0.35, 32)
    settings = {"dtype": torch.float32, "batch": 2, "rounds": 1, "seconds": 0.0, "reference": size}
    with pytest.raises(AssertionError, match=r"more was in all turns of \[\(0.35, 32\)\]"):
        bench_widths.measure([size], tolerance=-1.0, **settings)

    def wrong(model, shape, dtype):
        """Right but for the last image."""
        made = plan(model, shape, dtype=dtype)
        return lambda x: made(x) * torch.tensor([[1.0], [1.01]])

    monkeypatch.setattr(bench_widths, "plan", wrong)
    with pytest.raises(AssertionError, match="largest error must be at most 0.0001"):
        bench_widths.measure([size], tolerance=1e9, **settings)
