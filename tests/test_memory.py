"""Measured memory: known patterns of allocation, to the byte."""

import pytest
import torch

from mnv2_kernels import memory


def pattern():
    first = torch.empty(1000)
    second = torch.empty(2000)
    del first
    third = torch.empty(3000)
    del third
    return second


def test_every_allocation_and_release_is_seen_in_order():
    assert memory.live_bytes(pattern) == [4000, 12000, 8000, 20000, 8000]
    assert memory.peak_bytes(pattern) == 20000
    assert memory.allocations(pattern) == [4000, 8000, 12000]


def test_result_counts_and_input_does_not():
    x = torch.ones(1000)
    assert memory.live_bytes(lambda: x + x) == [4000]
    assert memory.live_bytes(lambda: x) == []
    assert memory.peak_bytes(lambda: x.add_(x)) == 0
    assert memory.allocations(lambda: None) == []


def test_sizes_are_exact():
    x = torch.ones(1, 2, 4, 6)
    sizes = memory.allocations(lambda: torch.nn.functional.pad(x, (1, 2, 3, 4)))
    assert sizes == [1 * 2 * 11 * 9 * 4]


def test_releasing_what_was_there_before_changes_nothing():
    for measured_when_allocated in (False, True):
        held = []

        def allocate(held=held):
            held.append(torch.empty(500))

        if measured_when_allocated:
            assert memory.live_bytes(allocate) == [2000]
        else:
            allocate()

        def replace(held=held):
            held[0] = None
            return torch.empty(4)

        assert memory.live_bytes(replace) == [16]


def test_the_same_on_every_run():
    x = torch.randn(1, 8, 14, 14)
    conv = torch.nn.Conv2d(8, 16, 1).eval()
    with torch.inference_mode():
        conv(x)
        runs = {tuple(memory.live_bytes(lambda: conv(x))) for _ in range(3)}
    assert len(runs) == 1
    assert max(runs.pop()) >= 16 * 14 * 14 * 4


def test_measuring_leaves_stderr_alone(capfd):
    memory.peak_bytes(pattern)
    assert capfd.readouterr().err == ""


class FakeCuda:
    """The caching allocator's counters, with 1000 bytes held before the call."""

    def __init__(self):
        self.held, self.peak, self.synchronised = 1000, 9999, 0

    def synchronize(self, device):
        self.synchronised += 1

    def reset_peak_memory_stats(self, device):
        self.peak = self.held

    def memory_allocated(self, device):
        return self.held

    def max_memory_allocated(self, device):
        return self.peak

    def call(self):
        self.peak = max(self.peak, self.held + 4096)
        self.held += 512


def test_cuda_peak_is_the_growth_of_the_allocators_maximum(monkeypatch):
    cuda = FakeCuda()
    for name in (
        "synchronize",
        "reset_peak_memory_stats",
        "memory_allocated",
        "max_memory_allocated",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    assert memory.peak_bytes(cuda.call, "cuda:0") == 4096
    assert memory.peak_bytes(cuda.call, torch.device("cuda")) == 4096
    assert cuda.synchronised == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_of_a_known_pattern():
    x = torch.ones(1024, device="cuda")
    assert memory.peak_bytes(lambda: x + (x + x), "cuda") == 8192


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device must be a CPU or CUDA device, got meta"):
        memory.peak_bytes(pattern, "meta")
