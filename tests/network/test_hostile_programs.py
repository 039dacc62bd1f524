"""Programs of `run_plan_in` with several numbers changed at once: an error or the right answer.

The arena has the very size that the true program needs, between marked bytes. Numbers are changed
one at a time, for float32, in test_plan_op.py. As there, what is no plan's program runs in a child
process: `python test_hostile_programs.py run_mutants 3000`, or `run_wrapping_sizes`.
"""

import random
import sys
from dataclasses import replace
from functools import cache, partial

import cases
import pytest
import torch
import torchvision_first  # noqa: F401
from plan_cases import image, network
from programs import HOSTILE, MARK, PROGRAMS, between_marks, one_by_one

import mnv2_kernels as mk
from mnv2_kernels.network.plan import Plan
from mnv2_kernels.network.program import encode
from mnv2_kernels.profiling import memory

pytestmark = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)

OP = torch.ops.mnv2.run_plan_in.default
BOUNDS = (float("nan"), -1.0, 0.0, 2.5, 6.0)


@cache
def prepared(name: str, shape: tuple, dtype: torch.dtype) -> tuple[Plan, torch.Tensor, int]:
    """A plan, x for it, and the bytes of the arena for a call by two threads."""
    plan = mk.plan(network(name), shape, dtype=dtype)
    x = image(*shape).to(dtype, memory_format=torch.channels_last)
    return plan, x, memory.allocations(partial(plan, x))[1]


def mutants(numbers: list, others: tuple, rng: random.Random) -> list:
    """The numbers with one to three of them changed: to others, to near ones, to their twins."""
    changed = list(numbers)
    for _ in range(rng.choice((1, 2, 2, 3))):
        i = rng.randrange(len(changed))
        value = changed[i]
        near = (value - 1, value + 1, value + 16, value - 16, 2 * value, -value)
        changed[i] = rng.choice((rng.choice(others), rng.choice(near), rng.choice(numbers)))
    return [min(max(n, -(2**63)), 2**63 - 1) if isinstance(n, int) else n for n in changed]


def moved(plan: Plan, rng: random.Random) -> list[int]:
    """The program with its results at other places of the arena, or streamed."""
    arena = plan._arena
    steps = [
        replace(
            step,
            offset=rng.randrange(0, arena + 32, 16) if rng.random() < 0.4 else step.offset,
            streams=step.streams != (rng.random() < 0.1),
        )
        for step in plan.steps
    ]
    return encode(steps, plan.input_shape, arena).integers


def check_mutant(plan: Plan, x: torch.Tensor, nbytes: int, integers: list, bounds: list) -> bool:
    """Whether it runs: then right, and nothing around the arena is touched in any case."""
    weights = plan._program.weights
    buffer, arena = between_marks(nbytes)
    begin = arena.data_ptr() - buffer.data_ptr()
    try:
        y = OP(x, arena, weights, integers, bounds)
    except ValueError as error:
        assert str(error).startswith("run_plan"), error
        assert (buffer == MARK).all()
        return False
    finally:
        assert (buffer[:begin] == MARK).all() and (buffer[begin + nbytes :] == MARK).all()
    truth = one_by_one(x, weights, integers, bounds)
    assert y.shape == truth.shape, (y.shape, truth.shape)
    if bounds != plan._program.bounds:
        return True  # Some bounds mean nothing: of a mean alone, of no expansion.
    finite = truth.isfinite()
    assert torch.equal(y.isfinite(), finite)
    error, scale = ((t * finite).nan_to_num().abs().max() for t in (y - truth, truth))
    assert error <= 40 * torch.finfo(x.dtype).eps * scale, (error, scale)
    return True


@torch.no_grad()
def run_mutants(count: str) -> None:
    rng = random.Random(0)
    accepted = 0
    torch.set_num_threads(2)
    for number in range(int(count)):
        dtype = rng.choice(cases.DTYPES)
        name, shape = rng.choice(PROGRAMS)
        plan, x, nbytes = prepared(name, shape, dtype)
        integers, bounds = plan._program.integers, plan._program.bounds
        if rng.random() < 0.1:
            bounds = mutants(bounds, BOUNDS, rng)
        elif rng.random() < 0.4:
            integers = moved(plan, rng)
        else:
            integers = mutants(integers, (*HOSTILE, *range(0, 2048, 16)), rng)
        threads = rng.choice((1, 2))
        print(number, name, dtype, threads, integers, bounds, flush=True)
        torch.set_num_threads(threads)
        accepted += check_mutant(plan, x, nbytes, integers, bounds)
    print("checked", count, accepted, flush=True)


def test_several_numbers_changed(python):
    count = 50_000 if cases.LONG else 300
    done = python(__file__, "run_mutants", str(count))
    printed = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} in {printed[-1:]}\n{done.stderr[-2000:]}"
    _, checked, accepted = printed[-1].split()
    assert int(checked) == count and count / 50 < int(accepted) < count / 2


# A stem of padding 1 at offset 0 and the mean of its result: C_in, H and W, C_out, and how many
# numbers the weights have. Products of the sizes are 0, or that few, modulo 2**64.
WRAPPING = {
    "result of 2**64 numbers": (1, 2**31 - 1, 16, 9 * 16),
    "9 * C_in * C_out = 2**64 + 1514171": (1093752733, 1, 1873950271, 1514171),
    "9 * C_in * C_out = 2**64 + 837560": (1153280126, 1, 1777224964, 837560),
}


def stem_and_mean(c_in: int, size: int, c_out: int) -> list[int]:
    halved = (size + 1) // 2
    head = [c_in, size, size, 1, c_out, 16, 2]
    stem = [0, 0, 0, 0, size, size, halved, halved, c_in, c_out, 1, 1, 0]
    return [*head, *stem, 2, 0, 0, 0, halved, halved, c_out, c_out, 0, 0]


@torch.no_grad()
def run_wrapping_sizes() -> None:
    for name, (c_in, size, c_out, weights) in WRAPPING.items():
        # One number at every place.
        x = torch.zeros(1).as_strided((1, c_in, size, size), (0, 0, 0, 0))
        integers = stem_and_mean(c_in, size, c_out)
        buffer, arena = between_marks(2**20)
        print(name, flush=True)
        try:
            OP(x, arena, [torch.zeros(weights), None], integers, [0.0, 6.0, 0.0, 6.0])
        except ValueError as error:
            assert "every tensor of program must have at most" in str(error), error
        else:
            raise AssertionError("it was accepted")
        assert (buffer == MARK).all()
    print("checked", len(WRAPPING), flush=True)


def test_sizes_whose_product_wraps_around(python):
    done = python(__file__, "run_wrapping_sizes")
    printed = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} in {printed[-1:]}\n{done.stderr[-2000:]}"
    assert printed[-1] == f"checked {len(WRAPPING)}"


@pytest.mark.parametrize("bounds", [(6.0, 0.0), (float("nan"), 6.0), (0.0, float("nan"))])
def test_bounds_that_are_none(bounds):
    plan, x, nbytes = prepared("short", (2, 3, 48, 40), torch.float32)
    program = plan._program
    right = plan(x)
    for i in range(0, len(program.bounds), 2):
        changed = [*program.bounds[:i], *bounds, *program.bounds[i + 2 :]]
        sentence = rf"^run_plan: bounds\[{i}\] and the next must be lower <= upper, got "
        with pytest.raises(ValueError, match=sentence):
            OP(x, between_marks(nbytes)[1], program.weights, program.integers, changed)
    assert torch.equal(plan(x), right)


def test_tensors_without_their_memory():
    """Their storage was freed, or made one byte smaller, unknown to them."""
    plan, x, nbytes = prepared("short", (2, 3, 48, 40), torch.float32)
    program = plan._program
    right = plan(x)
    for left in (0, 1):
        for i, weight in enumerate(program.weights):
            lost = weight.clone()
            lost.untyped_storage().resize_(left * (weight.nbytes - 1))
            weights = [*program.weights[:i], lost, *program.weights[i + 1 :]]
            sentence = rf"^run_plan: weights\[{i}\] must lie inside its storage, "
            with pytest.raises(ValueError, match=sentence):
                OP(x, between_marks(nbytes)[1], weights, program.integers, program.bounds)
        lost = x.clone()
        lost.untyped_storage().resize_(left * (x.nbytes - 1))
        with pytest.raises(ValueError, match="^run_plan: x must lie inside its storage, "):
            plan(lost)
        arena = torch.empty(nbytes, dtype=torch.uint8)
        arena.untyped_storage().resize_(left * (nbytes - 1))
        sentence = "^run_plan_in: arena must (lie inside its storage|be contiguous uint8)"
        with pytest.raises(ValueError, match=sentence):
            OP(x, arena, program.weights, program.integers, program.bounds)
    assert torch.equal(plan(x), right)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
