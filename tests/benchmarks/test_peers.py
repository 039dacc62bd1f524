"""Other runtimes and ours: each right, and timed without the time that others took."""

import os
import re
import sys

import pytest
import torch
from torch import nn

from benchmarks import harness, machine
from benchmarks.cpu.bench_memory import peer_row
from benchmarks.peers import __main__ as command
from benchmarks.peers import cases, check, limits, lost_time, run, turns
from benchmarks.peers.cases import Case
from benchmarks.peers.conversion import converted
from benchmarks.peers.process import WorkerFailed, WorkerProcess
from benchmarks.peers.registry import PEERS
from mnv2_kernels.block import cost
from mnv2_kernels.profiling import timing

pytestmark = pytest.mark.sampled(3)

needs_extension = pytest.mark.skipif(timing._C is None, reason="needs the compiled extension")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SMALL = Case("block15_b1", 1)
# The rows of a command are looked at in a test of their own.
RUN_BELOW = ("planned", "folded")


@pytest.fixture(scope="module")
def small():
    """(model, x, result in float64) of a block at 7x7."""
    model, x = SMALL.model(), SMALL.input()
    return model, x, harness.truth(model, x)


@pytest.mark.parametrize("name", [name for name in PEERS if name not in RUN_BELOW])
def test_peers_are_right(name, small, tmp_path):
    """Converted, loaded and run in processes of their own, as a benchmark does."""
    peer = PEERS[name]
    if reason := peer.why_not():
        pytest.skip(reason)
    model, x, expected = small
    folder = converted(peer, SMALL, model, tmp_path)
    assert (folder is None) == (peer.convert is None)
    result = tmp_path / "result.pt"
    with WorkerProcess(name, 1, tmp_path / "log") as worker:
        loaded = worker.ask(
            "load", peer=name, case=str(SMALL), folder=folder and str(folder), result=str(result)
        )
        if name == "fused" and loaded["used_avx512"] is not None:
            assert loaded["used_avx512"] == (machine.instruction_set() == "avx512")
        assert worker.ask("turn", seconds=0.001)["value"] > 1e-5
    rounding = check.bfloat16_rounding(model, x, expected)
    assert check.error_of(torch.load(result), expected, peer.precision, rounding) > 0
    if folder is not None:
        made = folder.stat().st_mtime_ns
        assert converted(peer, SMALL, model, tmp_path) == folder
        assert folder.stat().st_mtime_ns == made


@needs_extension
def test_a_command_writes_rows_of_what_is_right(tmp_path, monkeypatch, capsys):
    """Asked to keep to AVX2; the runs of other tests ask for nothing."""
    before = dict(os.environ)
    arguments = ["--cases", "block15_b1/t1", "--only", *RUN_BELOW, "--rounds", "2"]
    arguments += ["--seconds", "0.01", "--tolerance", "1e9", "--isa", "avx2"]
    arguments += ["--results", str(tmp_path), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])
    assert command.main() == 0
    rows = {row["provider"]: row for row in harness.load("peers", tmp_path)}
    assert set(rows) == set(RUN_BELOW)
    assert dict(os.environ) == before
    isa = machine.instruction_set()
    flops = Case("block15_b1", 1).flops
    for name, row in rows.items():
        other = next(o for o in RUN_BELOW if o != name)
        assert (row["block"], row["batch"], row["threads"]) == (15, 1, 1)
        assert row["config"] == "160x960x160-s1-k3"
        assert 0 < row["seconds"]["25%"] <= row["seconds"]["50%"] <= row["seconds"]["75%"]
        assert row["gflops"] == pytest.approx(flops / row["seconds"]["50%"] / 1e9)
        assert row["share_of_fma_peak"] == pytest.approx(row["gflops"] / row["fma_peak_gflops"])
        assert (row["rounds"], row["dropped"]) == (2, 0)
        assert set(row["speedup"]) == {other}
        assert 0 < row["error"] < 1e-5
        assert row["commit"] == machine.facts()["commit"]
        assert row["instruction_set"] == ("avx2" if isa == "avx512" else isa)
        if any(limits.TASKS.glob("*/arch_status")):
            assert row["limited"] is True
    printed = capsys.readouterr().out
    assert "planned: runs" in printed and "over planned's" in printed


def test_the_check_finds_a_missing_tap(small):
    model, x, expected = small
    folded = cases.folded(model)
    rounding = check.bfloat16_rounding(model, x, expected)
    y32 = folded(x)
    y16 = folded.bfloat16()(x.bfloat16()).float()
    assert check.error_of(y32, expected, "float32", None) < 1e-5
    assert check.error_of(y16, expected, "bfloat16", rounding) == pytest.approx(rounding)
    # Rounding to bfloat16 is not float32, whose policy is another.
    with pytest.raises(AssertionError, match="largest error must be at most 0.0001"):
        check.error_of(y16, expected, "float32", None)
    broken = cases.folded(model)
    convolution = next(m for m in broken.modules() if getattr(m, "groups", 1) > 1)
    convolution.weight.data[:, :, 0, 1] = 0
    for y in (broken(x), y16 * float("nan")):
        with pytest.raises(AssertionError, match="error must be at most 2 times"):
            check.error_of(y, expected, "bfloat16", rounding)
    with pytest.raises(AssertionError, match=r"shape must be \(1, 160, 7, 7\), got \(1, 160, 7\)"):
        check.error_of(y32[..., 0], expected, "float32", None)


def test_turns_rotate_and_lost_ones_do_not_count():
    order = []
    lost = {("a", 1): 0.5, ("b", 2): 0.021}

    def turn(name):
        number = order.count(name)
        order.append(name)
        return float(len(order)), lost.get((name, number), 0.02)

    found = turns.take_turns(
        {name: (lambda name=name: turn(name)) for name in "abc"},
        rounds=3,
        tolerance=0.02,
        pause=lambda: None,
    )
    # One turn of a and one of b are lost: a fourth round makes up for both, and no fifth is needed.
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert found["a"].values == [1, None, 8, 10]
    assert found["b"].values == [2, 4, None, 11]
    assert found["c"].values == [3, 5, 7, 12]
    assert (found["a"].dropped, found["c"].dropped) == (1, 0)
    assert found["a"].quartiles()["50%"] == 8
    # Of the rounds in which both count: 2 / 1 and 11 / 10.
    assert found["a"].ratio(found["b"]) == pytest.approx((2 + 1.1) / 2)
    assert turns.Samples([None, 1.0]).ratio(turns.Samples([1.0, None])) is None


def test_lost_time_is_read_from_the_system(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  1 2 3 4 5 6 7 250 0 0\ncpu0 1 2 3 4 5 6 7 9 0 0\n")
    assert lost_time.stolen_seconds(stat) == 2.5
    stat.write_text("cpu  1 2 3 4\n")
    assert lost_time.stolen_seconds(stat) == 0
    assert lost_time.stolen_seconds(tmp_path / "missing") == 0
    for thread, waited in (("1", 2_000_000_000), ("2", 500_000_000)):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(f"77 {waited} 5\n")
    assert lost_time.waited_seconds(tmp_path) == 2.5


def test_the_use_of_avx512_is_read_from_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SLEEP", 0)
    watch = limits.Avx512Watch(tmp_path)
    assert watch.used() is None
    for thread, text in (("1", "AVX512_elapsed_ms:\t-1\n"), ("2", "")):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "arch_status").write_text(text)
    assert watch.used() is False
    # Ten seconds ago: before the watch began.
    (tmp_path / "2" / "arch_status").write_text("AVX512_elapsed_ms:\t10000\n")
    assert watch.used() is False
    (tmp_path / "2" / "arch_status").write_text("AVX512_elapsed_ms:\t0\n")
    assert watch.used() is True


def test_limits_are_taken_back(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    before = dict(os.environ)
    with limits.limited(None):
        assert dict(os.environ) == before
    with pytest.raises(RuntimeError), limits.limited("avx2"):
        assert dict(os.environ) == before | limits.AVX2
        assert "AVX2" in PEERS["openvino-bf16"].needs()
        raise RuntimeError
    assert dict(os.environ) == before


def test_cases_are_what_their_names_say():
    assert len(cases.select(cases.DEFAULT, [1, 2])) == 2 * (3 + 17)
    small = Case("size_0.35_96_b1", 1)
    assert (small.block, small.size, small.batch) == (None, (0.35, 96), 1)
    assert small.input().shape == (1, 3, 96, 96)
    channels = [m.out_channels for m in small.model().modules() if isinstance(m, nn.Conv2d)]
    assert (channels[0], channels[-1]) == (16, 1280)
    assert small.flops == 2 * cost.network_multiply_adds(0.35, 96)
    assert Case("size_1.0_224_b1", 1).flops == Case("net_b1", 1).flops
    blocks = [Case(f"block{number:02}_b1", 1) for number in range(1, 18)]
    for number, case in enumerate(blocks, 1):
        config, size = harness.BLOCKS[number - 1]
        assert case.block == number
        assert tuple(case.input().shape) == (1, config.in_channels, size, size)
    network = Case("net_b8", 2)
    assert network.block is None and network.batch == 8
    assert network.flops == 8 * Case("net_b1", 1).flops
    assert 0.85 < sum(case.flops for case in blocks) / Case("net_b1", 1).flops < 0.95
    assert {case.relative for case in (small, network, *blocks)} == {None}


# Multiply-adds as their authors and libraries give them, in millions.
@pytest.mark.parametrize(
    "name, millions",
    [
        ("mobilenet_v3_large", 217),
        ("mobilenet_v3_small", 57),
        ("efficientnet_b0", 386),
        ("efficientnet_lite0", 385),
    ],
)
def test_relatives_are_right(name, millions):
    """As they are converted for other runtimes, and as they run here."""
    case = Case(f"{name}_b1", 1)
    assert case.relative.endswith(f":{name}") and (case.block, case.size) == (None, None)
    assert case.labels() == {"model": case.relative.replace(":", " "), "resolution": 224}
    assert case.flops == pytest.approx(2e6 * millions, rel=0.02)
    batch = Case(f"{name}_b8", 2)
    assert batch.input().shape == (8, 3, 224, 224) and batch.flops == 8 * case.flops
    model, x = case.model(), case.input()
    expected = harness.truth(model, x)
    for peer in (PEERS[peer] for peer in ("planned", "fused", "folded")):
        if peer.why_not() is None:
            source = case.model() if peer.as_written else cases.folded(model)
            loaded = peer.load(source, x, 1)
            with torch.inference_mode():
                loaded.run()
            assert check.error_of(loaded.output(), expected, "float32", None) < 1e-5


def test_relatives_are_run_when_asked_for():
    assert len(cases.select(["*"], [1, 2])) == 2 * len(cases.NAMES)
    asked = cases.select([f"{name}_b*" for name in cases.RELATIVES], [1, 2])
    assert {(case.batch, case.threads) for case in asked} == {(1, 1), (1, 2), (8, 1), (8, 2)}
    assert len(asked) == 16
    assert not set(asked) & set(cases.select(cases.DEFAULT, [1, 2]))


@on_linux
def test_memory_is_that_of_a_fresh_process(tmp_path):
    """Block 2 holds 4.6 MiB of hidden tensor an image where it is not fused."""
    case = Case("block02_b8", 1)
    config, size = harness.BLOCKS[1]
    hidden = 8 * 4 * config.hidden_channels * size**2
    rows = {n: peer_row(PEERS[n], case, tmp_path, tmp_path) for n in ("folded", "fused")}
    assert rows["folded"]["run_bytes"] > hidden
    if timing._C is not None:
        assert 0 <= rows["fused"]["run_bytes"] < hidden / 2
    for row in rows.values():
        assert row["load_bytes"] >= case.input().nbytes
        assert (row["suite"], row["batch"], row["dtype"]) == ("peers-memory", 8, "float32")


def test_neither_wrong_ones_nor_those_that_end_take_others_with_them(tmp_path, monkeypatch):
    def ask(self, do, **arguments):
        if (self.name, do) == ("eager", "turn"):
            raise WorkerFailed("eager: ended")
        loaded.append(arguments.get("peer"))
        return real(self, do, **arguments)

    def error_of(y, *args):
        return check.error_of(y * 1.01 if loaded[-1] == "fused" else y, *args)

    loaded, real = [], WorkerProcess.ask
    monkeypatch.setattr(WorkerProcess, "ask", ask)
    monkeypatch.setattr(run, "error_of", error_of)
    peers = [PEERS[name] for name in ("fused", "folded", "eager")]
    settings = run.Settings(rounds=1, seconds=0.001, tolerance=1e9, cache=tmp_path)
    (outcome,) = run.run([SMALL], peers, settings)
    assert [row["provider"] for row in outcome.rows] == ["folded"]
    assert outcome.rows[0]["speedup"] == {}
    assert outcome.failures["eager"] == "eager: ended"
    assert re.match(
        "wrong, not timed: largest error must be at most 0.0001, got 1.0.e-02",
        outcome.failures["fused"],
    )
