"""Measured memory: known patterns of allocation, to the byte."""

import cases
import pytest
import torch

from mnv2_kernels import InvertedResidual, fuse, mobilenet_v2
from mnv2_kernels.block import cost
from mnv2_kernels.block.config import mobilenet_v2_block_inputs
from mnv2_kernels.profiling import memory, timing

BLOCKS = list(mobilenet_v2_block_inputs())
SCRATCH = 256 * 1024  # most that a thread of a CPU kernel takes
needs_cpu_kernel = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)


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


def peak_of_call(number: int, batch: int) -> int:
    """Bytes beyond the input that block `number` holds in a fused call, at 224x224."""
    config, size = BLOCKS[number - 1]
    case = cases.Case(config, size, size, batch)
    x, weights = cases.make_inputs(case)
    x = x.to(memory_format=torch.channels_last)
    return memory.peak_bytes(lambda: cases.run("cpu", x, weights, **case.settings))


@needs_cpu_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("number", range(1, 18))
def test_a_fused_block_holds_input_result_and_scratch(number, threads):
    config, size = BLOCKS[number - 1]
    with timing.num_threads(threads):
        for batch in (1, 3):
            scratch = threads * SCRATCH
            x, _, _, y = cost.tensor_bytes(config, size, size, batch=batch)
            bound = cost.peak_bytes(
                config, size, size, execution="fused", batch=batch, scratch=scratch
            )
            assert y <= peak_of_call(number, batch) <= bound - x


@needs_cpu_kernel
def test_scratch_does_not_grow_with_the_batch():
    with timing.num_threads(2):
        for number in (3, 13, 17):
            config, size = BLOCKS[number - 1]
            result = cost.tensor_bytes(config, size, size).y
            scratch = {peak_of_call(number, batch) - batch * result for batch in (1, 2, 5)}
            assert len(scratch) == 1


@needs_cpu_kernel
def test_a_thousand_calls_leave_nothing_behind():
    module = InvertedResidual(8, 8).eval()
    x = torch.randn(1, 8, 4, 4)

    def many_calls():
        for _ in range(1000):
            module(x)

    with torch.inference_mode():
        module(x)
        live = memory.live_bytes(many_calls)
    assert live[-1] == 0
    assert max(live) == max(live[: len(live) // 1000])


@pytest.mark.parametrize("number", [1, 2, 3, 13])
def test_layer_by_layer_holds_at_least_what_is_computed(number):
    config, size = BLOCKS[number - 1]
    module = InvertedResidual(
        config.in_channels,
        config.out_channels,
        stride=config.stride,
        expand_ratio=config.hidden_channels / config.in_channels,
    ).eval()
    x = torch.randn(1, config.in_channels, size, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        module.plain_forward(x)
        measured = x.nbytes + memory.peak_bytes(lambda: module.plain_forward(x))
    computed = cost.peak_bytes(config, size, size, execution="eager")
    # Modules in modules hold one hidden tensor more, where the depthwise keeps the size.
    assert computed <= measured <= 1.5 * computed


@needs_cpu_kernel
@torch.inference_mode()
def test_a_second_profiled_call_folds_nothing():
    """Blocks of a network that ran as one call fold when a profiler first runs them one by one."""
    model = fuse(mobilenet_v2(0.35).eval())
    x = torch.randn(1, 3, 64, 64)
    model(x)
    settled = memory.peak_bytes_again(lambda: model(x))
    assert [memory.peak_bytes(lambda: model(x)) for _ in range(2)] == [settled] * 2
