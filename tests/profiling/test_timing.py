"""Timing: order, counts and arithmetic; no test here depends on how fast anything is."""

import gc

import pytest
import torch

from mnv2_kernels.profiling import timing


def test_calls_take_turns_within_a_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    samples = timing.interleave(calls, rounds=3, warmup=1, repeats=2)
    assert "".join(order) == "AB" + 3 * "AABB"
    assert list(samples) == ["A", "B"]
    assert all(len(s) == 3 for s in samples.values())


def test_samples_are_seconds_per_call(monkeypatch):
    now = [0.0]

    def takes_two():
        now[0] += 2.0

    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    assert timing.interleave({"A": takes_two}, rounds=2, repeats=5) == {"A": [2.0, 2.0]}


def test_garbage_collector_is_off_meanwhile_and_restored():
    seen = []
    timing.interleave({"A": lambda: seen.append(gc.isenabled())}, rounds=2, warmup=0)
    assert seen == [False, False]
    assert gc.isenabled()

    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        timing.interleave({"A": fails}, rounds=1, warmup=0)
    assert gc.isenabled()
    gc.disable()
    try:
        timing.interleave({"A": lambda: None}, rounds=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"rounds": 1, "repeats": 0}])
def test_nonsense_counts_are_refused(bad):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        timing.interleave({}, **bad)


def test_median_quartiles_and_speedup():
    assert timing.median([3.0, 1.0, 2.0]) == 2.0
    assert timing.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert timing.speedup([1.0, 2.0, 1.0], [3.0, 8.0, 5.0]) == 4.0
    with pytest.raises(ValueError):
        timing.speedup([1.0], [1.0, 2.0])


def test_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with timing.num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), timing.num_threads(1):
        raise KeyError
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="count must be at least 1, got 0"), timing.num_threads(0):
        pass


def test_peak_needs_the_extension(monkeypatch):
    monkeypatch.setattr(timing, "_C", None)
    assert timing.fma_peak() is None


@pytest.mark.skipif(timing._C is None, reason="needs the compiled extension")
def test_peak_is_measured_for_every_kernel():
    before = torch.get_num_threads()
    for kernel in timing._C.cpu_kernels():
        if kernel["available"]:
            # Two or four units of this many lanes, below 6 GHz; noise can only make it less.
            peak = timing.fma_peak(1, kernel["name"], seconds=0.01)
            assert 0.1 < peak < 2 * 3 * 6 * kernel["lanes"]
    assert timing.fma_peak(seconds=0.01) > 0.1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="kernel must be one of .*, got 'mmx'"):
        timing.fma_peak(1, "mmx")
