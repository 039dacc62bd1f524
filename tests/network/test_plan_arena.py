"""Plans that own their arena: what they hold and allocate, the same bits, threads, copies, forks.

Accesses outside of the arena are seen by the bytes around it; it has the very size that a call asks
for there. `python test_plan_arena.py call_in_a_fork` forks while another thread is in a call.
"""

import copy
import math
import os
import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import cases
import pytest
import torch
import torchvision_first  # noqa: F401
from plan_cases import image, network
from programs import MARK, between_marks
from torch import Tensor, nn
from torch.library import opcheck

import mnv2_kernels as mk
from mnv2_kernels.network.plan import Plan, why_not_on_cpu
from mnv2_kernels.profiling import memory

pytestmark = [
    pytest.mark.sampled(3),
    pytest.mark.skipif("cpu" not in cases.kernel_backends(), reason="needs the compiled extension"),
]

OP = torch.ops.mnv2.run_plan_in.default
NETWORKS = [
    ("ours-0.35", (33, 40)),
    ("features-3", (97, 33)),
    ("residuals", (33, 41)),
    ("mean-alone", (40, 33)),
    ("block", (17, 40)),
    ("block-residual", (9, 40)),
]
networks = pytest.mark.parametrize(("name", "size"), NETWORKS, ids=str)


def owning(name: str, size: tuple[int, int]) -> Plan:
    return mk.plan(network(name), (3, *size), own_arena=True)


def arguments(plan: Plan) -> tuple:
    """What the op gets after the arena."""
    return plan._program.weights, plan._program.integers, plan._program.bounds


def channels_last(*shape: int) -> Tensor:
    return image(*shape).contiguous(memory_format=torch.channels_last)


@networks
def test_the_bits_of_an_arena_by_call(name, size, set_threads):
    by_call = mk.plan(network(name), (3, *size))
    x = image(6, 3, *size)
    right = by_call(x)
    for made_for in (1, 2, 3):
        set_threads(made_for)
        plan = owning(name, size)
        for threads, batch in product((1, 2, 3, 5), (1, 2, 3, 5, 6)):
            set_threads(threads)
            assert torch.equal(plan(x[:batch]), right[:batch]), (made_for, threads, batch)


@networks
def test_a_call_allocates_its_result_alone(name, size, set_threads):
    for made_for in (1, 2, 3):
        set_threads(made_for)
        plan = owning(name, size)
        for threads, batch in product((1, 2, 3, 5), (1, 2, 3, 4)):
            set_threads(threads)
            x = channels_last(batch, 3, *size)
            assert memory.allocations(partial(plan, x)) == [plan(x).nbytes]


@networks
def test_it_owns_what_the_hungriest_call_allocates(name, size, set_threads):
    for threads in (1, 2, 3):
        set_threads(threads)
        by_call, plan = mk.plan(network(name), (3, *size)), owning(name, size)
        # Calls of more images also keep what the classifier reads of them, where nobody owns it.
        batches = [channels_last(n, 3, *size) for n in (1, threads)]
        most = max(memory.allocations(partial(by_call, x))[1] for x in batches)
        assert plan.owned_bytes == most and by_call.owned_bytes == 0
        assert memory.allocations(lambda: owning(name, size)).count(most) == 1


def test_a_thousand_calls_without_growth():
    plan, x = owning("short", (33, 40)), channels_last(1, 3, 33, 40)
    result = plan(x).nbytes
    held, place = plan.owned_bytes, plan._owned._memory.data_ptr()

    def often():
        for _ in range(1000):
            plan(x)

    assert memory.allocations(often) == [result] * 1000
    assert (plan.owned_bytes, plan._owned._memory.data_ptr()) == (held, place)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, set_threads):
    if (reason := why_not_on_cpu(dtype)) is not None:
        pytest.skip(reason)
    for name, size in NETWORKS:
        for threads, batch in product((1, 2), (1, 3)):
            set_threads(threads)
            x = channels_last(batch, 3, *size).to(dtype)
            by_call = mk.plan(network(name), (3, *size), dtype=dtype)
            plan = mk.plan(network(name), (3, *size), dtype=dtype, own_arena=True)
            right, allocated = by_call(x), memory.allocations(partial(by_call, x))
            assert torch.equal(plan(x), right)
            assert memory.allocations(partial(plan, x)) == allocated[:1] == [right.nbytes]
            if (threads, batch) != (1, 3):  # Whose images wait for the classifier.
                assert plan.owned_bytes >= allocated[1]


@networks
def test_what_the_arena_holds_does_not_matter(name, size, set_threads):
    x = image(3, 3, *size)
    right = mk.plan(network(name), x.shape)(x)
    for threads in (1, 2):
        set_threads(threads)
        plan = owning(name, size)
        for byte in (0, 0xFF):  # zeros, NaN
            plan._owned._memory.fill_(byte)
            assert torch.equal(plan(x), right)


@networks
def test_results_are_no_part_of_the_arena(name, size):
    plan, x = owning(name, size), image(3, 3, *size)
    first = plan(x)
    kept = first.clone()
    plan(x.flip(3))
    plan._owned._memory.fill_(0xFF)
    assert torch.equal(first, kept)


def test_inference_mode():
    x = image(2, 3, 33, 40)
    with torch.inference_mode():
        plan = owning("features-3", (33, 40))
        right = plan(x)
    assert torch.equal(plan(x), right) and torch.equal(owning("features-3", (33, 40))(x), right)


def test_print_says_whose_the_arena_is(set_threads):
    set_threads(1)
    assert str(mk.plan(network("short"), (3, 33, 40))).endswith("; allocated by each call")
    for threads, most in ((1, "one thread"), (3, "3 threads")):
        set_threads(threads)
        plan = owning("short", (33, 40))
        assert str(plan).endswith(
            f"owned by the plan: {plan.owned_bytes:,} bytes for at most {most}"
        )


def test_another_device_than_a_cpu_is_refused():
    plan = mk.plan(network("features-3"), (3, 33, 40))
    plan._program.weights[:] = [w.to("meta") for w in plan._program.weights]
    with pytest.raises(ValueError, match="^plan: own_arena must be False for a model on meta, "):
        plan._own_arena()
    assert plan.owned_bytes == 0


@pytest.mark.parametrize("own_arena", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_that_call_one_plan_at_once(own_arena, threads, set_threads):
    plan = mk.plan(network("features-3"), (3, 64, 64), own_arena=own_arena)
    images = [image(n, 3, 64, 64) for n in (1, 2, 3, 4)]
    right = [plan(x) for x in images]
    start = threading.Barrier(len(images))

    def call(number: int) -> list[bool]:
        torch.set_num_threads(threads)
        start.wait()
        return [torch.equal(plan(images[number]), right[number]) for _ in range(60)]

    with ThreadPoolExecutor(len(images)) as pool:
        for same in pool.map(call, range(len(images))):
            assert all(same), f"{same.count(False)} of {len(same)} results are wrong"


def test_a_call_waits_for_the_one_before_and_copies_do_not():
    plan, x = owning("short", (33, 40)), image(1, 3, 33, 40)
    right = plan(x)
    with ThreadPoolExecutor(2) as pool:
        with plan._owned.taken():
            waiting = pool.submit(plan, x)
            assert torch.equal(pool.submit(copy.deepcopy(plan), x).result(timeout=60), right)
            assert not waiting.done()
        assert torch.equal(waiting.result(timeout=60), right)


def test_an_error_leaves_the_arena_free():
    plan, x = owning("short", (33, 40)), image(1, 3, 33, 40)
    right = plan(x)
    weights = plan._program.weights
    plan._program.weights[1] = weights[1].double()
    with pytest.raises(ValueError, match=r"^run_plan: weights\[1\] must be "):
        plan(x)
    plan._program.weights[1] = weights[1].float()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(plan, x).result(timeout=60), right)


@pytest.mark.parametrize(
    "made", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))]
)
def test_copies(made):
    plan, x = owning("short", (33, 40)), image(2, 3, 33, 40)
    other = made(plan)
    assert torch.equal(other(x), plan(x)) and other.owned_bytes == plan.owned_bytes
    shared = other._owned._memory.data_ptr() == plan._owned._memory.data_ptr()
    assert shared == (other._owned is plan._owned) == (made is copy.copy)


def call_in_a_fork() -> None:
    torch.set_num_threads(1)
    plan, x = owning("short", (33, 40)), image(1, 3, 33, 40)
    right = plan(x)
    taken, forked = threading.Event(), threading.Event()

    def be_in_a_call():
        with plan._owned.taken():
            taken.set()
            forked.wait()

    other = threading.Thread(target=be_in_a_call)
    other.start()
    taken.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(plan(x), right) else 1)
    forked.set()
    other.join()
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(120)
def test_a_fork_while_another_thread_is_in_a_call(python):
    done = python(__file__, "call_in_a_fork")
    assert done.stdout.split() == ["child", "0"], done.stderr


class Around(nn.Module):
    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def forward(self, x):
        return self.plan(x) + 1


def test_compilers_get_the_op_without_side_effects():
    plan, x = owning("features-3", (33, 40)), image(2, 3, 33, 40)
    right = plan(x) + 1
    targets = []

    def look(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(Around(plan), backend=look, fullgraph=True)
    assert torch.equal(compiled(x), right)
    exported = torch.export.export(Around(plan), (x,))
    assert torch.equal(exported.module()(x), right)
    targets += [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.mnv2.run_plan.default) == 2 and OP not in targets


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("name", ["short", "features-3", "block"])
def test_opcheck(name, batch):
    plan, x = owning(name, (33, 40)), image(batch, 3, 33, 40)
    arena = torch.empty(plan.owned_bytes, dtype=torch.uint8)
    passed = opcheck(OP, (x, arena, *arguments(plan)))
    assert len(passed) == 4 and set(passed.values()) == {"SUCCESS"}


@networks
def test_nothing_around_the_arena_is_touched(name, size, set_threads):
    plan = mk.plan(network(name), (3, *size))
    for threads, batch in product((1, 2, 3, 5), (1, 2, 3, 5)):
        set_threads(threads)
        x = channels_last(batch, 3, *size)
        right, nbytes = plan(x), memory.allocations(partial(plan, x))[1]
        buffer, arena = between_marks(nbytes)
        assert torch.equal(OP(x, arena, *arguments(plan)), right)
        used = (buffer != MARK).nonzero().flatten()
        begin = arena.data_ptr() - buffer.data_ptr()
        assert begin <= used[0] and used[-1] < begin + nbytes, (threads, batch)


@networks
def test_a_smaller_arena_is_used_by_fewer_threads(name, size, set_threads):
    plan, x = mk.plan(network(name), (3, *size)), channels_last(3, 3, *size)
    right, needed = plan(x), {}
    for threads in (1, 2, 3):
        set_threads(threads)
        # By one thread as for one image; no thread has several here, which would wait.
        images = x[:1] if threads == 1 else x
        needed[threads] = memory.allocations(partial(plan, images))[1]
    set_threads(3)
    for nbytes in (*needed.values(), needed[2] - 1, needed[3] - 1):
        buffer, arena = between_marks(nbytes)
        assert torch.equal(OP(x, arena, *arguments(plan)), right)
        outside = [buffer[: arena.data_ptr() - buffer.data_ptr()], buffer[-64:]]
        assert all((part == MARK).all() for part in outside)
    for nbytes in (0, 1, needed[1] - 64, needed[1] - 1):
        _, arena = between_marks(nbytes)
        sentence = f"^run_plan_in: arena must have at least {needed[1]} bytes, got {nbytes}$"
        with pytest.raises(ValueError, match=sentence):
            OP(x, arena, *arguments(plan))
        assert (arena == MARK).all()


KIND = (
    "run_plan_in: arena must be contiguous uint8 on the CPU that begins at a multiple of 64 bytes"
)
SHARED = "run_plan_in: arena must not share memory with "
BAD_ARENAS = {
    "dtype": (KIND, lambda arena, x, weights: arena.view(torch.float32)),
    "place": (KIND, lambda arena, x, weights: arena[16:]),
    "step": (KIND, lambda arena, x, weights: arena.repeat(2)[::2]),
    "device": (
        "run_plan: arena must be on the device of x, cpu, got meta",
        lambda arena, x, weights: arena.to("meta"),
    ),
    "x": (SHARED + "x", lambda arena, x, weights: x.view(-1).view(torch.uint8)),
    "weights": (
        SHARED + "weights[2]",
        lambda arena, x, weights: weights[2].view(-1).view(torch.uint8),
    ),
}


@pytest.mark.parametrize("what", BAD_ARENAS)
def test_bad_arenas(what):
    sentence, change = BAD_ARENAS[what]
    plan, x = mk.plan(network("short"), (3, 33, 40)), image(2, 3, 33, 40)
    right, (weights, *rest) = plan(x), arguments(plan)
    _, arena = between_marks(10 * plan.arena_bytes)
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        OP(x, change(arena, x, weights), weights, *rest)
    assert torch.equal(plan(x), right) and (arena == MARK).all()


@pytest.mark.parametrize(
    ("channels", "hidden", "out_channels", "size"), [(160, 960, 1280, 4), (4096, 256, 16, 8)]
)
@torch.no_grad()
def test_very_many_channels_in_sixteen_bits(channels, hidden, out_channels, size):
    """What one block needs besides weights of that size is cut finer than in float32."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, deviation: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * deviation

    weights = [
        numbers(channels, hidden, deviation=channels**-0.5).half(),
        numbers(hidden),
        numbers(3, 3, hidden, deviation=0.3).half(),
        numbers(hidden),
        numbers(hidden, out_channels, deviation=hidden**-0.5).half(),
        numbers(out_channels),
    ]
    image = [channels, size, size]
    sizes = [*image[1:], *image[1:], channels, hidden, out_channels, 3, 1, 1, 1, 1, 0, 1, 0]
    program = [*image, 3, out_channels, *image[1:], 0, 1, 1, 0, 0, 0, *sizes, 0, 0, 0, 0]
    bounds = [0.0, 6.0, 0.0, 6.0, -math.inf, math.inf]
    x = numbers(2, *image).half().contiguous(memory_format=torch.channels_last)
    short = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match="arena must have at least") as needed:
        OP(x, short, weights, program, bounds)
    nbytes = int(str(needed.value).split("at least ")[1].split()[0])
    memory = torch.full((nbytes + 4096,), 171, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    y = OP(x, memory[start : start + nbytes], weights, program, bounds)
    assert (memory[start + nbytes :] == 171).all() and (memory[:start] == 171).all()
    settings = (1, [1, 1, 1, 1], 1, False, bounds[:2], bounds[2:4], bounds[4:])
    expected = torch.ops.mnv2.inverted_residual(x, *weights, *settings)
    assert (y - expected).abs().max() <= 2e-3 * expected.abs().max()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
