"""Programs of `run_plan_in` whose gates, curves and places are not those of a plan.

Each is an error, or computed right; nothing around the arena is touched. They run in a child
process, as in test_hostile_programs.py: `python test_hostile_gates.py run_all`.
"""

import random
import sys
from dataclasses import replace
from functools import cache
from math import prod

import cases
import pytest
import torch
import torchvision_first  # noqa: F401
from foreign_blocks import conv_norm_act, v3
from plan_cases import image, settle
from programs import HOSTILE, MARK, between_marks, one_by_one
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual as MobileNetV3Block
from torchvision.models.mobilenetv3 import InvertedResidualConfig

import mnv2_kernels as mk
from mnv2_kernels.block.config import CURVES, SCALES
from mnv2_kernels.network.arena import describe
from mnv2_kernels.network.plan import Plan
from mnv2_kernels.network.program import Block, Program, Step, encode, shapes

pytestmark = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)

OP = torch.ops.mnv2.run_plan_in.default
SHAPE = (3, 24, 20)


def model() -> nn.Module:
    """A stem that streams into a gated block, one with a residual, one of several chunks."""
    torch.manual_seed(0)
    blocks = [v3(8, stride=2, se=True), v3(24, se=True, act="HS", kernel=5), v3(400, se=True)]
    head = [*conv_norm_act(8, 40, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    tail = [nn.Linear(40, 30), nn.SiLU(), nn.Linear(30, 5)]
    stem = conv_norm_act(3, 8, 3, 2, act=nn.GELU)
    layers = nn.Sequential(nn.Sequential(*stem), *blocks, *head, *tail)
    return settle(layers, torch.randn(4, *SHAPE))


@cache
def prepared(dtype: torch.dtype) -> tuple[Plan, Tensor]:
    x = image(2, *SHAPE).to(dtype, memory_format=torch.channels_last)
    return mk.plan(model(), SHAPE, dtype=dtype), x


def nbytes(program: Program, arena: int) -> int:
    lines = describe(program, 2)["line_bytes"]
    return -(-arena * program.dtype.itemsize // 64) * 64 + 2 * lines


def call(x: Tensor, program: Program, size: int) -> Tensor | None:
    """The result, None where it is refused; what is around the arena must stay as it was."""
    buffer, arena = between_marks(size)
    begin = arena.data_ptr() - buffer.data_ptr()
    try:
        return OP(x, arena, program.weights, program.integers, program.bounds)
    except ValueError as error:
        assert str(error).startswith("run_plan"), error
        assert (buffer == MARK).all()
        return None
    finally:
        assert (buffer[:begin] == MARK).all() and (buffer[begin + size :] == MARK).all()


def check(x: Tensor, program: Program, size: int) -> bool:
    """Whether it runs; then right."""
    y = call(x, program, size)
    if y is None:
        return False
    truth = one_by_one(x, program.weights, program.integers, program.bounds)
    assert y.shape == truth.shape, (y.shape, truth.shape)
    error = (y.double() - truth).abs().max()
    assert error <= 100 * torch.finfo(x.dtype).eps * truth.abs().max(), error
    return True


def places_of_gates(plan: Plan) -> list[int]:
    """Of the flag "there is a gate" of each block, found by writing the program without it."""
    found = []
    for i, step in enumerate(plan.steps):
        if isinstance(step.layer, Block) and step.layer.weights.gate is not None:
            weights = replace(step.layer.weights, gate=None)
            bare = [*plan.steps]
            bare[i] = replace(step, layer=replace(step.layer, weights=weights))
            other = encode(bare, SHAPE, plan._arena).integers
            whole = plan._program.integers
            # What follows a block is the kind of a step, which the flag 1 is not always unlike.
            tail = len(other) - len(encode_before(bare, i))
            found.append(len(whole) - tail - 4)
    return found


def encode_before(steps: list[Step], last: int) -> list[int]:
    """Integers of the program up to a step; the head, which says the result, is as long."""
    head = len(encode(steps, SHAPE, 0).integers) - len(encode(steps[: last + 1], SHAPE, 0).integers)
    dims = 2 if len(shapes(steps[: last + 1], SHAPE)[-1]) == 3 else 0
    whole = encode(steps, SHAPE, 0).integers
    return whole[: len(whole) - head - dims]


def run_numbers() -> None:
    """Every number of a gate and every curve, one at a time, changed to whatever may harm."""
    accepted = 0
    for dtype in cases.DTYPES:
        plan, x = prepared(dtype)
        p = plan._program
        size = nbytes(p, plan._arena)
        assert check(x, p, size)
        for place in places_of_gates(plan):
            assert p.integers[place] == 1 and p.integers[place + 2] in range(len(SCALES))
            for i in range(place - 3, place + 4):
                for value in (*HOSTILE[:8], HOSTILE[-1], 4, len(CURVES) + 1):
                    changed = [*p.integers[:i], value, *p.integers[i + 1 :]]
                    print(dtype, i - place, value, flush=True)
                    accepted += check(x, replace(p, integers=changed), size)
    print("checked", accepted, flush=True)


def run_weights() -> None:
    """A gate without its weights, and with weights of every other kind."""
    for dtype in cases.DTYPES:
        plan, x = prepared(dtype)
        p = plan._program
        size = nbytes(p, plan._arena)
        gates = [s.layer.weights.gate for s in plan.steps if isinstance(s.layer, Block)]
        own = {id(t) for gate in gates if gate is not None for t in gate.tensors()}
        places = [i for i, w in enumerate(p.weights) if id(w) in own]
        assert len(places) == 12
        for i in places:
            weight = p.weights[i]
            others = [weight[:-1], torch.cat([weight, weight]), weight.double(), weight[:0]]
            others += [weight.repeat_interleave(2, -1)[..., ::2], weight.flatten()[:1]]
            others += [None] if weight.dim() > 1 else []
            for other in others:
                weights = [*p.weights[:i], other, *p.weights[i + 1 :]]
                assert call(x, replace(p, weights=weights), size) is None, (i, other)
            missing = [*p.weights[:i], *p.weights[i + 1 :]]
            assert call(x, replace(p, weights=missing), size) is None
            if weight.dim() == 1:
                weights = [*p.weights[:i], None, *p.weights[i + 1 :]]
                zeros = [*p.weights[:i], weight * 0, *p.weights[i + 1 :]]
                y, truth = (call(x, replace(p, weights=w), size) for w in (weights, zeros))
                assert torch.equal(y, truth)
    print("checked", flush=True)


def moved(step: Step, rng: random.Random, arena: int, most: int) -> Step:
    offset, streams = step.offset, step.streams
    if rng.random() < 0.3:
        offset = rng.choice((0, 16, max(arena - most, 0), rng.randrange(0, arena + 32, 16)))
    if rng.random() < 0.06:
        streams = not streams
    kept = step.kept
    if rng.random() < 0.1:
        kept = rng.randrange(0, arena + 32, 16)
    return replace(step, offset=offset, streams=streams, kept=kept)


def run_places() -> None:
    """Steps that stream where they cannot, and results at every place of the arena."""
    rng, accepted = random.Random(0), [0, 0]
    for dtype in cases.DTYPES:
        plan, x = prepared(dtype)
        sizes = [prod(shape) for shape in shapes(plan.steps, SHAPE)]
        most = -(-max(sizes) // 16) * 16
        for _ in range(1000 if cases.LONG else 100):
            arena = rng.choice((most, plan._arena, plan._arena, 2 * most))
            steps = [moved(step, rng, arena, most) for step in plan.steps]
            p = encode(steps, SHAPE, arena)
            print(dtype, arena, [(s.offset, s.streams) for s in steps], flush=True)
            try:
                size = nbytes(p, arena)
            except ValueError:
                size = nbytes(plan._program, arena)
            accepted[check(x, p, size)] += 1
    print("checked", *accepted, flush=True)


def chain(*blocks: nn.Module) -> Plan:
    """A stem and gated blocks, and the mean of their result."""
    torch.manual_seed(0)
    stem, pool = conv_norm_act(3, 8, 3, 2), [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers = nn.Sequential(nn.Sequential(*stem), *blocks, *pool)
    return mk.plan(settle(layers, torch.randn(4, *SHAPE)), SHAPE)


def streaming(plan: Plan, number: int) -> list[Step]:
    steps = kept_at(plan, 3 * SIZE)
    return [replace(s, streams=s.streams or i == number) for i, s in enumerate(steps)]


def placed(plan: Plan, *offsets: int) -> list[Step]:
    steps = kept_at(plan, 3 * SIZE)
    for i, offset in enumerate(offsets):
        steps[i] = replace(steps[i], offset=offset, streams=False)
    return steps


def kept_at(plan: Plan, kept: int) -> list[Step]:
    """The first two results side by side, and what is kept for gates in one place."""
    steps = [replace(step, kept=kept) for step in plan.steps]
    for i in range(2):
        steps[i] = replace(steps[i], offset=i * SIZE, streams=False)
    return steps


APART = "step 1 in program overwrites its input"
CANNOT = "cannot stream: it does not go through the image row by row"
SIZE = 8 * 12 * 10


def gated(c_in: int, c_out: int, hidden: int = 24) -> nn.Module:
    config = InvertedResidualConfig(8, 3, 8, 8, True, "HS", 1, 1, 1.0)
    # The constructor rounds channels to multiples of 8.
    config.input_channels, config.expanded_channels, config.out_channels = c_in, hidden, c_out
    config.use_res_connect = c_in == c_out
    return MobileNetV3Block(config, nn.BatchNorm2d)


def named() -> list[tuple[str, Plan, list[Step], str | None]]:
    """What is done, to which plan, and the sentence that refuses it; None: it runs, and is right.

    Tensors after the stem have SIZE numbers, a multiple of 16. What is kept for a gate is behind
    three of them.
    """
    residual, other = chain(gated(8, 8)), chain(gated(8, 7))
    many, two = chain(gated(8, 7, 800)), chain(gated(8, 7), gated(7, 6))
    one = chain(gated(8, 7, 8))
    return [
        ("stem into a residual", residual, streaming(residual, 0), CANNOT),
        ("stem into several chunks", many, streaming(many, 0), CANNOT),
        ("stem into one chunk", one, streaming(one, 0), None),
        ("a gated block streams", two, streaming(two, 1), CANNOT),
        ("residual in place", residual, placed(residual, 16, 16), None),
        ("residual 16 numbers on", residual, placed(residual, 0, 16), APART),
        ("residual 16 numbers back", residual, placed(residual, 16, 0), APART),
        ("residual behind", residual, placed(residual, 0, SIZE), None),
        ("in place", other, placed(other, 16, 16), None),
        ("16 numbers on", other, placed(other, 0, 16), None),
        ("16 numbers back", other, placed(other, 32, 16), None),
        ("two over each other", two, placed(two, 0, 16, 32), None),
        ("two in one place", two, placed(two, 16, 16, 16), None),
        ("behind the arena", other, placed(other, 0, 2**20), "outside of the arena"),
        ("kept over the input", other, kept_at(other, 0), "over its input or its result"),
        ("kept over the result", other, kept_at(other, SIZE), "over its input or its result"),
        ("kept behind the arena", other, kept_at(other, 2**20), "outside of the arena"),
    ]


def run_named() -> None:
    """Each by one and by two threads."""
    for what, plan, steps, sentence in named():
        x = image(2, *SHAPE)
        arena = 3 * SIZE + max(describe(plan._program, 1)["kept"])
        p = encode(steps, SHAPE, arena)
        size = nbytes(plan._program, arena) + 2**16
        for threads in (1, 2):
            torch.set_num_threads(threads)
            print(what, threads, flush=True)
            assert check(x, p, size) == (sentence is None), what
            if sentence is not None:
                with pytest.raises(ValueError, match=sentence):
                    OP(x, between_marks(size)[1], p.weights, p.integers, p.bounds)
    print("checked", flush=True)


def run_all() -> None:
    for run in (run_named, run_numbers, run_weights, run_places):
        print(f"== {run.__name__}", flush=True)
        run()


def test_programs_that_are_wrong_about_gates(python):
    """Some of the changed numbers are no gate at all, other scales and curves: those are right."""
    done = python(__file__, "run_all", OMP_NUM_THREADS="1")
    printed = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} in {printed[-1:]}\n{done.stderr[-2000:]}"
    named, numbers, weights, places = (p.split()[1:] for p in printed if p.startswith("checked"))
    assert named == weights == []
    assert int(numbers[0]) >= 30
    refused, accepted = map(int, places)
    assert refused >= 30 and accepted >= 10


if __name__ == "__main__":
    with torch.no_grad():
        globals()[sys.argv[1]](*sys.argv[2:])
