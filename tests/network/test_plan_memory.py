"""What a plan allocates, to the byte, and that it stays within it.

Accesses outside of it are hit by SIGSEGV in a child process, whose heap is guard_malloc.c:
`python test_plan_memory.py run_on_guarded_heap`.
"""

import math
import sys

import cases
import pytest
import torch
import torchvision_first  # noqa: F401
from plan_cases import WIDTHS, features, image, network

import mnv2_kernels as mk
from mnv2_kernels.network.plan import Plan
from mnv2_kernels.profiling import memory

pytestmark = [
    pytest.mark.sampled(3),
    pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension"),
]

ARENA = 401_408  # bytes: the paper's 200 kB at 16 bit, in float32
LINES = 512 * 1024
MEASURED = [
    ("ours-1", (224, 224)),
    ("ours-0.35", (97, 131)),
    ("ours-tf", (96, 96)),
    ("features-3", (131, 97)),
    ("features-1", (33, 40)),
    ("residuals", (64, 75)),
    ("mean-alone", (33, 40)),
    ("timm-lite0", (64, 96)),
    ("timm-mobilenetv1", (96, 64)),
]
GUARDED = [
    ("short", (3, 3, 48, 40)),
    ("ours-0.35", (3, 3, 33, 40)),
    ("features-3", (3, 3, 33, 41)),
    ("residuals", (3, 3, 33, 41)),
    ("residuals", (2, 3, 3, 2)),
    ("mean-alone", (3, 3, 7, 9)),
    ("block-residual", (3, 3, 9, 8)),
    ("timm-mobilenetv1", (3, 3, 33, 32)),
]


def workspace(plan: Plan, batch: int, threads: int) -> int:
    """Bytes besides the result: one image by all threads, or one for each of them at a time."""

    def kept(images: int) -> int:
        return min(images, 8) * plan.feature_bytes if images > 1 else 0

    one_image = plan.arena_bytes + plan.line_bytes(threads)
    if threads == 1 or batch < threads:
        return one_image + kept(batch)
    image_each = threads * (plan.arena_bytes + plan.line_bytes(1) + kept(batch // threads))
    rest = batch % threads
    return max(image_each, one_image + kept(rest)) if rest else image_each


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("name", "size"), MEASURED, ids=str)
def test_allocations_are_the_result_and_one_workspace(name, size, threads, set_threads):
    set_threads(threads)
    plan = mk.plan(network(name), (3, *size))
    for batch in (1, 2, 3, 4, 11):
        x = image(batch, 3, *size)
        y = plan(x)
        expected = [y.nbytes, workspace(plan, batch, threads)]
        for other in (x, x.to(memory_format=torch.channels_last), x.flip(3)[..., :]):
            assert memory.allocations(lambda x=other: plan(x)) == expected
            assert memory.peak_bytes(lambda x=other: plan(x)) == sum(expected)


def test_without_a_stem_another_layout_costs_a_copy():
    plan = mk.plan(network("block-residual"), (3, 20, 30))
    x = image(2, 3, 20, 30)
    expected = [x.nbytes, workspace(plan, 2, 1)]
    assert memory.allocations(lambda: plan(x)) == [*expected[:1], x.nbytes, *expected[1:]]
    x = x.to(memory_format=torch.channels_last)
    assert memory.allocations(lambda: plan(x)) == expected


def test_the_paper_s_network():
    plan = mk.plan(network("ours-1"), (3, 224, 224))
    assert plan.arena_bytes <= ARENA and plan.line_bytes(1) <= LINES
    assert features(plan)["streams"] >= 2 and features(plan)["overwrites"] >= 2
    stated = f"arena {plan.arena_bytes:,} bytes; line buffers and scratch {plan.line_bytes(1):,}"
    assert stated in str(plan)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_arena_holds_what_the_table_says(width):
    for size in (96, 128, 160, 192, 224):
        plan = mk.plan(network(f"ours-{width:g}"), (3, size, size))
        rows = plan.rows()
        assert [row.name for row in rows] == list(plan.names) and len(rows) == 20
        kept = [row for row in rows if row.offset is not None]
        ends = [row.offset + math.prod(row.shape) * 4 for row in kept]
        assert max(ends) <= plan.arena_bytes < max(ends) + 64
        assert rows[-1].offset is None and rows[-1].nbytes == 4 * rows[-1].shape[0]
        for row, step in zip(rows, plan.steps, strict=True):
            assert (row.rows is not None) == step.streams
            in_memory = row.rows or row.shape[1] if len(row.shape) == 3 else 1
            per_row = row.shape[0] * row.shape[2] if len(row.shape) == 3 else row.shape[0]
            assert row.nbytes == 4 * per_row * in_memory
            assert row.rows is None or 1 <= row.rows <= row.shape[1]
        assert all(1 <= row.rows <= 8 for row in rows[:2]), "the largest tensors"
        table = str(plan).splitlines()
        assert len(table) == 22 and table[20].split()[-2] == "result"
        assert sum(" streams " in line for line in table) == sum(s.streams for s in plan.steps)


def test_a_thousand_calls_without_growth():
    plan = mk.plan(network("short"), (3, 33, 40))
    x = image(1, 3, 33, 40)
    once = memory.live_bytes(lambda: plan(x))

    def often():
        for _ in range(1000):
            plan(x)

    live = memory.live_bytes(often)
    assert max(live) == max(once) and live[-1] == 0 and len(live) == 4000


def run_on_guarded_heap() -> None:
    for name, shape in GUARDED:
        plan, x = mk.plan(network(name), shape), image(*shape)
        torch.set_num_threads(1)
        right = plan(x)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for other in (x, x.to(memory_format=torch.channels_last), x[:1]):
                print(name, threads, tuple(other.shape), flush=True)
                assert torch.equal(plan(other), right[: len(other)])


def test_nothing_behind_what_it_allocates(python, guarded_heap):  # noqa: F811
    done = python(__file__, "run_on_guarded_heap", **guarded_heap)
    printed = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} in {printed[-1:]}\n{done.stderr[-2000:]}"
    assert len(printed) == 12 * len(GUARDED)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
