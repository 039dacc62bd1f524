"""What `import mnv2_kernels` gives, needs and leaves alone."""

import re
from importlib import util
from pathlib import Path

import pytest

import mnv2_kernels as mk
from mnv2_kernels.cli import main as cli

ROOT = Path(__file__).parents[2]

# As a CUDA build of PyTorch, with or without GPUs.
IMPORT_AS_IN_A_CUDA_BUILD = """
import os, sys, tempfile, torch
torch.version.cuda = "13.0"
before, modules = dict(os.environ), set(sys.modules)
import mnv2_kernels
added = set(sys.modules) - modules
print(sorted(m for m in added if m.startswith(("torch._inductor", "torch._dynamo"))))
print({k: v for k, v in os.environ.items() if before.get(k) != v})
print(os.listdir(tempfile.gettempdir()))
"""
# A package that is None in sys.modules cannot be imported.
ALONE = """
import sys
sys.modules |= dict.fromkeys(("numpy", "rich", "triton"))
import torch, mnv2_kernels as mk
torch.manual_seed(0)
block, x = mk.InvertedResidual(16, 16).eval(), torch.randn(1, 16, 9, 9)
with torch.inference_mode():
    torch.testing.assert_close(mk.fuse(block)(x), block.plain_forward(x))
print(mk.backends()["triton"])
try:
    mk.inverted_residual(x, mk.fold(block), residual=True, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_dir_lists_the_public_names():
    assert sorted(dir(mk)) == sorted({*mk.__all__, "__version__"})
    assert all(getattr(mk, name) is not None for name in dir(mk))


def test_types_are_those_of_results():
    from mnv2_kernels import types

    model = mk.mobilenet_v2(0.35).eval()
    report = mk.explain(model)
    assert type(model) is types.MobileNetV2
    assert type(report) is types.Report and type(report[0]) is types.Row
    assert type(mk.plan(model, (3, 32, 32))) is types.Plan
    assert all(hasattr(types, name) for name in types.__all__)


def test_one_version(capsys):
    changes = re.findall(r"^## \[([\d.]+)\] - (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert changes[0][0] == mk.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {mk.__version__}\ndate-released: {changes[0][1]}\n" in citation
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"mnv2_kernels {mk.__version__}\n"
    assert cli.main(["info"]) == 0
    assert re.search(rf"^mnv2_kernels +{mk.__version__} in /", capsys.readouterr().out, re.M)


def test_import_leaves_pytorchs_compiler_alone(python, tmp_path):
    done = python("-c", IMPORT_AS_IN_A_CUDA_BUILD, TMPDIR=str(tmp_path))
    assert done.stdout.splitlines() == ["[]", "{}", "[]"], done.stderr


def test_pytorch_is_all_that_is_needed(python):
    done = python("-c", ALONE)
    assert done.returncode == 0, done.stderr
    why, error = done.stdout.splitlines()
    assert why.startswith("cannot run: Triton is not installed (")
    assert error.startswith("inverted_residual: backend 'triton' cannot run here: Triton is not")


def test_interpreting_needs_numpy(python):
    if util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    program = "import sys; sys.modules['numpy'] = None\n"
    program += "from mnv2_kernels.ops.triton import interpreter\ninterpreter.run('', (1,), (), {})"
    done = python("-c", program)
    last = done.stderr.splitlines()[-1]
    assert last.endswith("needs numpy, not installed here: pip install numpy"), done.stderr


@pytest.mark.parametrize("program", ["-m", "script"])
def test_the_command_line_needs_rich(python, program):
    run = "import runpy; runpy.run_module('mnv2_kernels', run_name='__main__')"
    script = "from mnv2_kernels.__main__ import main; sys.exit(main())"
    done = python(
        "-c", f"import sys; sys.modules['rich'] = None; {run if program == '-m' else script}"
    )
    assert done.returncode == 2 and done.stdout == ""
    expected = "mnv2: needs rich, not installed here: pip install 'mnv2_kernels[cli]'\n"
    assert done.stderr == expected
