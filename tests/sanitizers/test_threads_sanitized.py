"""Threads that compute at the same time: on shared weights from Python, and under ThreadSanitizer.

OpenMP's threads are not known to ThreadSanitizer, so the driver (cpu_alone) runs the parts of a
network by threads of its own, and calls one network from several threads at once.
"""

from concurrent.futures import ThreadPoolExecutor

import cpu_driver
import pytest
import torch
from cases import LONG
from seeded_faults import FAULTS, seeded_texts

import mnv2_kernels as mk

WHY_NOT = cpu_driver.why_not(cpu_driver.THREADS)
long_run_only = [
    pytest.mark.skipif(not LONG, reason="compiles for ThreadSanitizer: MNV2_LONG=1"),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(1800),
]


def marked(function):
    for mark in long_run_only:
        function = mark(function)
    return function


@pytest.fixture
def intra_op_threads(request):
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("intra_op_threads", [1, 2, 4], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("kernel_backend")
@torch.no_grad()
def test_one_network_in_eight_threads(intra_op_threads, dtype):
    """A plan and a fused model, whose weights and packed forms all threads share."""
    calls = 200 if LONG else 20
    model = mk.mobilenet_v2(0.35).eval().to(dtype)
    plan = mk.plan(model, (3, 32, 40), dtype=dtype)
    fused = mk.fuse(model)
    images = torch.randn(8, 1, 3, 32, 40).to(dtype)
    torch.set_num_threads(1)
    right = [(plan(x), fused(x)) for x in images]
    assert len({str(y) for y, _ in right}) == 8

    def unequal(number: int) -> int:
        torch.set_num_threads(intra_op_threads)
        found = 0
        with torch.no_grad():
            for call in range(calls):
                at = (number + call) % 8
                found += not torch.equal(plan(images[at]), right[at][0])
                found += not torch.equal(fused(images[at]), right[at][1])
        return found

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(unequal, range(8))) == 0


@marked
def test_no_thread_reads_what_another_writes():
    driver = cpu_driver.build(["default"], cpu_driver.THREADS)
    outcome = cpu_driver.run(driver, "default", "threads")
    assert not outcome.found, (outcome.printed[-500:], outcome.errors[:3000])
    assert outcome.counts["calls"] >= 190


@marked
def test_a_race_is_found():
    driver = cpu_driver.build(["default"], cpu_driver.THREADS, seeded_texts())
    number = list(FAULTS).index("rows of the band behind read late") + 1
    outcome = cpu_driver.run(driver, "default", "threads", MNV2_SEEDED_FAULT=str(number))
    assert "race" in outcome.found
