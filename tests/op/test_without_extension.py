"""Where the compiled extension is missing: models run, and a sentence says what to do, once."""

import json

import pytest

import mnv2_kernels as mk
from mnv2_kernels.ops.extension import missing

pytestmark = pytest.mark.sampled(2)

# Runs in a process that cannot import the extension; `said` are the warnings so far.
PRELUDE = """
import sys, warnings, json
sys.modules["mnv2_kernels._C"] = None
import torch
import mnv2_kernels as mk

torch.manual_seed(0)
model, x = mk.mobilenet_v2(0.35, num_classes=5).eval(), torch.randn(2, 3, 32, 32)
said = []
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_, **__: said.append(str(message))
"""
SENTENCE = "no kernel runs here, so that models run layer by layer: the compiled extension is not"


@pytest.fixture
def without_extension(python):
    """What a script prints as JSON there."""

    def run(script: str):
        done = python("-c", PRELUDE + script)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize(
    "call",
    [
        "mk.fuse(model)",
        "mk.fuse(model, inplace=True)",
        "mk.fuse(model.double())",
        "mk.plan(model, (3, 32, 32))",
    ],
)
def test_the_first_call_says_so_once(without_extension, call):
    """With the reason and with what to type; the line is that of the user."""
    script = f"""
{call}
first = list(said)
{call}
mk.fuse(model), mk.plan(model, (3, 64, 64))
print(json.dumps([first, said]))
"""
    first, all_said = without_extension(script)
    assert first == all_said and len(first) == 1
    assert first[0].startswith(SENTENCE) and "pip install --force-reinstall" in first[0]


def test_the_warning_points_at_the_line_of_the_user(python):
    for call in ("mk.fuse(model)", "mk.plan(model, (3, 32, 32))"):
        script = "warnings.showwarning = lambda *a, **k: print(a[2], a[3])\n\n" + call
        done = python("-c", PRELUDE + script)
        assert done.stdout.split() == ["<string>", str(len((PRELUDE + script).splitlines()))]


@pytest.mark.parametrize(
    "call",
    [
        "mk.fuse(model, backend='reference')",
        "mk.fuse(torch.nn.Conv2d(3, 8, 3))",
        "mk.explain(model)",
        "mk.backends()",
    ],
)
def test_nothing_is_said_where_nothing_was_promised(without_extension, call):
    assert without_extension(f"{call}\nprint(json.dumps(said))") == []


def test_nothing_is_said_where_another_backend_may_run_the_model(without_extension):
    """As on a machine with a GPU and Triton, whose GPU the model may be moved to."""
    script = """
from mnv2_kernels.ops import backends
torch.cuda.is_available = lambda: True
asked, ask = [], backends.why_no_kernel
def why(x, block=None):
    asked.append(x.device.type)
    return ask(x, block) if x.device.type == "cpu" else None
backends.why_no_kernel = why
torch.empty = lambda *args, _empty=torch.empty, device=None, **more: (
    type("X", (), {"device": torch.device(device)})() if device == "cuda"
    else _empty(*args, device=device, **more))
mk.fuse(model)
of_fuse = list(said)
mk.plan(model, (3, 32, 32))
print(json.dumps([of_fuse, len(said), sorted(set(asked))]))
"""
    of_fuse, in_all, asked = without_extension(script)
    assert of_fuse == [] and in_all == 1 and asked == ["cpu", "cuda"]


def test_models_and_plans_give_the_same_answers(without_extension):
    script = """
from copy import deepcopy
with torch.no_grad():
    truth = deepcopy(model).double()(x.double())
    plan = mk.plan(model, (3, 32, 32))
    errors = [((f(x) - truth).abs().max() / truth.abs().max()).item()
              for f in (mk.fuse(model), plan, mk.fuse(mk.fuse(model)))]
    half = mk.plan(model, (3, 32, 32), dtype=torch.bfloat16)(x.bfloat16())
errors.append(((half - truth).abs().max() / truth.abs().max()).item() / 1e4)
print(json.dumps(errors))
"""
    assert max(without_extension(script)) < 1e-5


def test_a_plan_can_be_shown(without_extension, tmp_path):
    """Printed and drawn, with its steps; it says that they run one by one."""
    script = f"""
plan = mk.plan(model, (3, 64, 64))
plan.figure({str(tmp_path / "plan.png")!r})
print(json.dumps([repr(plan), str(plan), [row.name for row in plan.rows()], plan.arena_bytes]))
"""
    shown, text, names, arena = without_extension(script)
    assert shown == text and all(name in shown for name in names) and arena > 0
    assert shown.endswith("the steps run one by one, and allocate their results")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    own = mk.plan(mk.mobilenet_v2(0.35, num_classes=5).eval(), (3, 64, 64))
    assert names == [row.name for row in own.rows()]


def test_an_arena_of_its_own_is_refused(without_extension):
    script = """
try:
    mk.plan(model, (3, 32, 32), own_arena=True)
except RuntimeError as error:
    print(json.dumps(str(error)))
"""
    said = without_extension(script)
    assert said.startswith("plan: own_arena must be False here: the compiled extension is not")


@pytest.mark.parametrize("made", ["model", "mk.fuse(model)"])
def test_explain_has_one_line_of_reasons(without_extension, made):
    script = f"""
report = mk.explain({made}, input_shape=(3, 32, 32))
print(json.dumps([str(report), [row.reason for row in report], report.runs_as_one]))
"""
    text, reasons, as_one = without_extension(script)
    assert not as_one and len(reasons) == 17 and len(set(reasons)) == 1
    assert text.count("not available") == text.count("pip install") == 1
    *table, note, summary = text.splitlines()
    assert max(map(len, table)) < 120 and len(table) == 19
    assert note == f"[1] 17 blocks: {reasons[0]}"
    assert summary == "0 of 17 blocks run fused."


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_the_command_line_says_it_on_one_line(python, command):
    """`bench` times what runs; `verify` has nothing to verify, unless a model is named."""
    script = f"""
from mnv2_kernels.cli.main import main
arguments = ["--model", "mobilenet_v2", "--width", "0.35", "--resolution", "32"]
sys.exit(main(["{command}", *arguments, *(["--rounds", "1"] if "{command}" == "bench" else [])]))
"""
    done = python("-c", PRELUDE + script)
    assert done.returncode == 0
    assert done.stderr.startswith(f"mnv2 {command}: {SENTENCE}") and done.stderr.count("\n") == 1
    assert all(f"│ {name} " in done.stdout for name in ("fused", "planned")) or command == "verify"


@pytest.mark.skipif(missing is not None, reason="without it that is the reason")
def test_a_dtype_that_no_kernel_takes_has_a_short_reason():
    """That of the device of x alone."""
    (row,) = mk.explain(mk.InvertedResidual(8, 8).double().eval(), input_shape=(8, 5, 6))
    assert row.state == "plain"
    assert row.reason == "x must be float32, float16 or bfloat16, got torch.float64"
