"""Memory of a call: its result and a bounded workspace, and never the expanded tensor."""

import gc
import os

import cases
import pytest
import torch
from cases import Case, make_inputs, run

from mnv2_kernels.block.config import BlockConfig, mobilenet_v2_block_inputs
from mnv2_kernels.profiling import memory

pytestmark = pytest.mark.sampled(2)

WORKSPACE_PER_THREAD = 256 * 1024
BLOCKS = [
    pytest.param(Case(config, size, size), id=f"{number}-{config.name}-{size}px")
    for number, (config, size) in enumerate(mobilenet_v2_block_inputs(), 1)
]


def prepare(
    backend: str,
    case: Case,
    batch: int = 1,
    memory_format=torch.channels_last,
    dtype: torch.dtype = torch.float32,
):
    """(a call to measure, bytes of its result, bytes of the expanded tensor)."""
    x, weights = make_inputs(case, dtype)
    x = x.expand(batch, -1, -1, -1).contiguous(memory_format=memory_format)

    def call():
        return run(backend, x, weights, **case.settings)

    expanded = batch * case.config.hidden_channels * case.height * case.width * x.element_size()
    return call, call().nbytes, expanded


@pytest.mark.parametrize("case", BLOCKS)
def test_peak_of_every_block(kernel_backend, tested_dtype, case, set_threads):
    for threads in (1, 2, 4):
        set_threads(threads)
        for batch in (1, 3):
            call, result, _ = prepare(kernel_backend, case, batch, dtype=tested_dtype)
            workspace = memory.peak_bytes(call) - result
            assert 0 <= workspace <= threads * WORKSPACE_PER_THREAD, f"{threads=} {batch=}"


@pytest.mark.parametrize("case", BLOCKS)
def test_the_expanded_tensor_is_never_allocated(kernel_backend, tested_dtype, case, set_threads):
    set_threads(1)
    workspaces = {}
    for batch in (1, 2, 4, 8, 16):
        call, result, expanded = prepare(kernel_backend, case, batch, dtype=tested_dtype)
        sizes = memory.allocations(call)
        assert sizes.count(result) >= 1
        workspaces[batch] = sum(sizes) - result
        # In 16 bits the expanded tensor of one small image is less than the workspace.
        least = 0 if tested_dtype == torch.float32 else WORKSPACE_PER_THREAD + 1
        assert all(size < max(expanded, least) for size in sizes if size != result)
    assert workspaces[16] <= max(workspaces[1], workspaces[2]), "a larger batch needs no more"


def test_the_reference_does_allocate_it():
    """The measurement sees what the kernels avoid."""
    for case in (block.values[0] for block in BLOCKS):
        call, _, expanded = prepare("reference", case)
        assert max(memory.allocations(call)) >= expanded


def test_another_layout_costs_one_copy_of_x(kernel_backend, set_threads):
    set_threads(1)
    case = Case(BlockConfig(24, 144, 24, residual=True), 56, 56)
    call, result, _ = prepare(kernel_backend, case, 2, torch.contiguous_format)
    x_bytes = 2 * 24 * 56 * 56 * 4
    assert memory.peak_bytes(call) - result - x_bytes <= WORKSPACE_PER_THREAD


def test_workspace_of_unusual_shapes(kernel_backend, tested_dtype, set_threads):
    set_threads(1)
    padding = (8, 8, 8, 8)
    members = [case for group in cases.groups().values() for case in group if case.batch == 1] + [
        Case(BlockConfig(3, 1000, 3, kernel_size=5, dilation=2, padding=padding), 9, 3000),
        Case(BlockConfig(3, 1000, 3, kernel_size=5, dilation=2, padding=padding), 3000, 9),
        Case(BlockConfig(8, 17, 2000, stride=2), 50, 501),
        Case(BlockConfig(2000, 2000, 8, expansion=False), 20, 21),
    ]
    for case in members:
        call, result, _ = prepare(kernel_backend, case, dtype=tested_dtype)
        assert memory.peak_bytes(call) - result <= WORKSPACE_PER_THREAD, case.id


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc on this system")
def test_a_thousand_calls_leave_nothing_behind(kernel_backend):
    def resident_bytes() -> int:
        gc.collect()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for case in (block.values[0] for block in BLOCKS[2::4]):
        call, result, _ = prepare(kernel_backend, case)
        for _ in range(100):
            call()
        before = resident_bytes()
        for _ in range(1000):
            call()
        # A leaked result or workspace would be a thousand of them.
        assert resident_bytes() - before < 100 * result, case.id
