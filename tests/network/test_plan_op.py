"""torch.ops.mnv2.run_plan: what PyTorch is told about it, bad calls, hostile programs.

A program that is no plan's runs in a child process, since nothing but a check keeps it from memory
that is not its own: `python test_plan_op.py run_hostile_programs`.
"""

import re
import sys

import cases
import pytest
import torch
import torchvision_first  # noqa: F401
from plan_cases import image, network
from programs import HOSTILE, PROGRAMS, one_by_one
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F

import mnv2_kernels as mk
from mnv2_kernels.network.plan import Plan

pytestmark = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)

OP = torch.ops.mnv2.run_plan.default
SAMPLES = [
    ("ours-0.35", (2, 3, 33, 40)),
    ("features-3", (2, 3, 33, 40)),
    ("residuals", (1, 3, 20, 21)),
    ("mean-alone", (3, 3, 33, 40)),
    ("block", (2, 3, 9, 8)),
    ("block", (0, 3, 9, 8)),
    ("ours-without-bias", (0, 3, 33, 40)),
]
samples = pytest.mark.parametrize(("name", "shape"), SAMPLES, ids=str)


def prepared(name: str, shape: tuple) -> tuple[Plan, Tensor]:
    return mk.plan(network(name), shape), image(*shape)


def arguments(plan: Plan) -> tuple:
    """What the op gets after x."""
    return plan._program.weights, plan._program.integers, plan._program.bounds


@samples
def test_opcheck(name, shape):
    plan, x = prepared(name, shape)
    passed = opcheck(OP, (x, *arguments(plan)))
    assert len(passed) == 4 and set(passed.values()) == {"SUCCESS"}
    strided = image(*shape[:3], 2 * shape[3])[..., ::2]
    opcheck(OP, (strided, *arguments(plan)), test_utils=("test_schema", "test_faketensor"))


@samples
def test_the_fake_result_is_like_the_true_one(name, shape):
    plan, x = prepared(name, shape)
    y = plan(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = OP(mode.from_tensor(x), *arguments(plan))
    weights = [w if w is None else w.to("meta") for w in arguments(plan)[0]]
    meta = OP(x.to("meta"), weights, *arguments(plan)[1:])
    for other in (fake, meta):
        assert (other.shape, other.dtype, other.stride()) == (y.shape, y.dtype, y.stride())
    assert fake.device.type == "cpu" and meta.device.type == "meta"


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole(compiler, fresh_compiler):
    plan, x = prepared("ours-0.35", (2, 3, 33, 40))

    def call(x):
        return F.softmax(2 * plan(x + 1), dim=1)

    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(call, backend=compiler, fullgraph=True)(x), call(x)
        )


def test_compiled_for_any_batch(fresh_compiler):
    plan, _ = prepared("features-3", (1, 3, 33, 40))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plan.__call__, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 8):
        x = image(batch, 3, 33, 40)
        assert torch.equal(compiled(x), plan(x))
    assert counter.frame_count <= 2


def test_exported():
    plan, x = prepared("ours-0.35", (2, 3, 33, 40))

    class Classify(nn.Module):
        def forward(self, x):
            return plan(x).argmax(1)

    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Classify(), (x,), dynamic_shapes=({0: batch},))
    assert sum(node.target is OP for node in exported.graph.nodes) == 1
    for other in (x, image(5, 3, 33, 40)):
        assert torch.equal(exported.module()(other), plan(other).argmax(1))


def test_inference_tensors_and_modes():
    plan, x = prepared("features-3", (2, 3, 33, 40))
    right = plan(x)
    with torch.inference_mode():
        inner = x.clone()
        assert torch.equal(plan(inner), right)
        made = mk.plan(network("features-3"), x.shape)
    assert torch.equal(plan(inner), right) and torch.equal(made(x), right)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plan(x), right)


def test_gradients_are_refused():
    plan, x = prepared("features-3", (2, 3, 33, 40))
    right = plan(x)
    with pytest.raises(TypeError, match="^plan: x must not require gradients, a plan has none$"):
        plan(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(plan(x.clone().requires_grad_()), right)
    assert not plan(x).requires_grad


BAD_CALLS = [
    (ValueError, "(N, 3, 33, 40), got (2, 3, 33, 41)", lambda x: F.pad(x, (0, 1))),
    (ValueError, "(N, 3, 33, 40), got (2, 3, 32, 40)", lambda x: x[:, :, 1:]),
    (ValueError, "(N, 3, 33, 40), got (2, 2, 33, 40)", lambda x: x[:, 1:]),
    (ValueError, "(N, 3, 33, 40), got (3, 33, 40)", lambda x: x[0]),
    (ValueError, "(N, 3, 33, 40), got (1, 2, 3, 33, 40)", lambda x: x[None]),
    (ValueError, "(N, 3, 33, 40), got ()", lambda x: x.sum()),
    (TypeError, "torch.float32 on cpu, got torch.float64 on cpu", lambda x: x.double()),
    (TypeError, "torch.float32 on cpu, got torch.bfloat16 on cpu", lambda x: x.bfloat16()),
    (TypeError, "torch.float32 on cpu, got torch.int64 on cpu", lambda x: x.long()),
    (TypeError, "torch.float32 on cpu, got torch.float32 on meta", lambda x: x.to("meta")),
]


@pytest.mark.parametrize(("error", "sentence", "change"), BAD_CALLS)
def test_bad_calls(error, sentence, change):
    plan, x = prepared("ours-0.35", (2, 3, 33, 40))
    right = plan(x)
    with pytest.raises(error, match="^plan: x must .*" + re.escape(sentence) + "$"):
        plan(change(x))
    assert torch.equal(plan(x), right)


@pytest.mark.parametrize(("error", "sentence", "change"), BAD_CALLS[:9])
def test_bad_calls_of_the_op(error, sentence, change):
    plan, x = prepared("ours-0.35", (2, 3, 33, 40))
    right = plan(x)
    if change(x).dtype == torch.bfloat16:  # Taken, but with weights of the same.
        error, named = ValueError, r"weights\[0\] must be 432 contiguous numbers of BFloat16"
    else:
        named = "x must "
    with pytest.raises(error, match=f"^run_plan: {named}"):
        OP(change(x), *arguments(plan))
    assert torch.equal(OP(x, *arguments(plan)), right)


def bad_weights(weight: Tensor):
    yield weight[:-1]
    yield torch.cat([weight, weight])
    yield weight[:0]
    yield weight.double()
    yield weight.half()
    yield weight.repeat_interleave(2, -1)[..., ::2]
    yield weight.flatten()[:1].expand(weight.numel())


@pytest.mark.parametrize("name", ["short", "mean-alone"])
def test_bad_weights(name):
    plan, x = prepared(name, (2, 3, 33, 40))
    weights, integers, bounds = arguments(plan)
    right = plan(x)
    for i, weight in enumerate(weights):
        others = [*bad_weights(weight), *([None] if weight.dim() > 1 else [])]
        for other in others:
            changed = [*weights[:i], other, *weights[i + 1 :]]
            with pytest.raises(ValueError, match=rf"^run_plan: weights\[{i}\] must be "):
                OP(x, changed, integers, bounds)
    for changed in (weights[:-1], weights[:1], [], [*weights, None], [*weights, weights[-1]]):
        with pytest.raises(ValueError, match=r"^run_plan: "):
            OP(x, changed, integers, bounds)
    for changed in (bounds[:-1], bounds[2:], [], [*bounds, 0.0], [*bounds, 0.0, 6.0]):
        with pytest.raises(ValueError, match=r"^run_plan: .*bounds"):
            OP(x, weights, integers, changed)
    assert torch.equal(plan(x), right)


def test_biases_may_be_missing():
    """None is a bias of zeros, wherever there is one."""
    for name in ("short", "mean-alone"):
        plan, x = prepared(name, (2, 3, 33, 40))
        weights, *rest = arguments(plan)
        biases = [i for i, w in enumerate(weights) if w.dim() == 1]
        for i in biases:
            zeros = [*weights[:i], torch.zeros_like(weights[i]), *weights[i + 1 :]]
            without = [*weights[:i], None, *weights[i + 1 :]]
            assert torch.equal(OP(x, without, *rest), OP(x, zeros, *rest)), i
        assert len(biases) == len(weights) // 2


def check_program(x: Tensor, weights: list, integers: list[int], bounds: list[float]) -> bool:
    """Whether a program runs; one that does must do what it says."""
    try:
        y = OP(x, weights, integers, bounds)
    except ValueError:
        return False
    truth = one_by_one(x, weights, integers, bounds)
    assert y.shape == truth.shape, (y.shape, truth.shape)
    assert (y - truth).abs().max() <= 1e-5 * truth.abs().max(), (y - truth).abs().max()
    return True


@torch.no_grad()
def run_hostile_programs() -> None:
    for name, shape in PROGRAMS:
        plan, x = prepared(name, shape)
        weights, integers, bounds = arguments(plan)
        assert check_program(x, weights, integers, bounds)
        calls = accepted = 0
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for i, value in enumerate(integers):
                near = (value - 1, value + 1, value + 16, value - 16, 2 * value)
                values = sorted({*near} if threads == 2 else {*HOSTILE, *integers, *near})
                for other in values if cases.LONG else values[i % 9 :: 9]:
                    if not -(2**63) <= other < 2**63 or other == value:
                        continue
                    print(name, threads, i, value, other, flush=True)
                    changed = [*integers[:i], other, *integers[i + 1 :]]
                    accepted += check_program(x, weights, changed, bounds)
                    calls += 1
        for end in range(len(integers)):
            assert not check_program(x, weights, integers[:end], bounds)
            calls += 1
        assert not check_program(x, weights, [*integers, 1], bounds)
        assert check_program(x, weights, integers, bounds)
        print("checked", name, calls, accepted, flush=True)


@pytest.mark.timeout(900)
def test_hostile_programs(python):
    done = python(__file__, "run_hostile_programs")
    printed = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} in {printed[-1:]}\n{done.stderr[-2000:]}"
    checked = [line.split() for line in printed if line.startswith("checked")]
    assert len(checked) == len(PROGRAMS)
    for _, name, calls, accepted in checked:
        assert 0 < int(accepted) < int(calls) / 4, name
        assert int(calls) > (250 if cases.LONG else 50), name


if __name__ == "__main__":
    globals()[sys.argv[1]]()


def test_saved_for_another_process(tmp_path, python):
    """As the docstring of `Plan` says."""
    plan, x = prepared("ours-0.35", (2, 3, 33, 40))
    torch.save(plan, tmp_path / "plan.pt")
    torch.save(x, tmp_path / "x.pt")
    script = """
import sys, torch
plan, x = (torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False) for name in ("plan", "x"))
torch.save(plan(x), f"{sys.argv[1]}/y.pt")
print(plan)
"""
    done = python("-c", script, str(tmp_path))
    assert done.stdout == f"{plan}\n", done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), plan(x))
