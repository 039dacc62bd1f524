"""Who runs a call where there are CUDA kernels: the backend, the kernel, and what is said."""

from dataclasses import replace
from functools import partial
from importlib import import_module

import cases
import pytest
import torch
from cases import Case
from cuda_calls import DTYPES, GENERIC, PATCH, TILE, backends, compiles, inputs
from torch import Tensor
from torch._subclasses import FakeTensorMode

import mnv2_kernels as mk
from mnv2_kernels import FoldedWeights, inverted_residual
from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6
from mnv2_kernels.ops import extension
from mnv2_kernels.ops.extension import module as _C
from mnv2_kernels.ops.inverted_residual import _block, op_arguments


@pytest.fixture
def built(monkeypatch):
    """As if the CUDA kernels were in this build, for tensors without memory."""
    monkeypatch.setattr(backends, "cuda_missing", None)
    with FakeTensorMode():
        yield


def fake(case: Case, dtype: torch.dtype = torch.float16) -> tuple[Tensor, FoldedWeights]:
    """Inputs that say that they are on a GPU."""
    c = case.config
    new = partial(torch.empty, device="cuda", dtype=dtype)
    weights = FoldedWeights(
        new(c.in_channels, c.hidden_channels) if c.expansion else None,
        None,
        new(c.kernel_size, c.kernel_size, c.hidden_channels),
        None,
        new(c.hidden_channels, c.out_channels),
        None,
        *case.clips,
    )
    return new(case.batch, c.in_channels, case.height, case.width), weights


def chosen(case: Case, dtype: torch.dtype, backend: str | None = None) -> str:
    """What runs a call on such inputs; kernels are called, the reference needs real memory."""
    x, weights = fake(case, dtype)
    block = _block(op_arguments(weights, case.config))
    assert block == backends.Block.of(case.config, case.clips)
    name = backends.choose(backend, x, block)
    if name != "reference":
        with cases.runs_on(name):
            y = inverted_residual(x, weights, backend=backend, **case.settings)
        assert y.is_cuda and y.dtype == dtype
    return name


@compiles
def test_who_runs_by_itself(built, monkeypatch):
    for dtype in DTYPES[:2]:
        assert chosen(PATCH, dtype) == chosen(TILE, dtype) == "cuda"
        assert chosen(GENERIC, dtype) == "triton"
    assert chosen(PATCH, torch.float32) == "reference"
    monkeypatch.setattr(backends, "_tf32_allowed", lambda: True)
    assert chosen(PATCH, torch.float32) == "triton"
    monkeypatch.setattr(backends.triton, "missing", lambda: "no Triton")
    assert chosen(GENERIC, torch.float16) == chosen(PATCH, torch.float32) == "cuda"


@compiles
def test_who_runs_when_asked(built):
    for name in ("cuda", "triton", "reference"):
        for case in (PATCH, GENERIC):
            for dtype in DTYPES:
                assert chosen(case, dtype, name) == name
    sentence = "backend 'cuda' cannot run here: x must be float32, float16 or bfloat16, got"
    with pytest.raises(RuntimeError, match=sentence):
        chosen(PATCH, torch.float64, "cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: x must be on a GPU, got cpu"):
        backends.choose("cuda", torch.empty(1, 16, 8, 8))


@compiles
def test_why_it_declines(built):
    x, _ = fake(GENERIC)
    block = backends.Block.of(GENERIC.config, GENERIC.clips)
    cuda = next(b for b in backends.BACKENDS if b.name == "cuda")
    assert cuda.why_not(x) is None and cuda.why_refused(x, block) is None
    runs_anyway = "has no tensor cores; backend='cuda' runs it anyway"
    assert cuda.why_not(x, block) == f"the kernel for such a block {runs_anyway}"
    x, _ = fake(PATCH, torch.float32)
    assert cuda.why_not(x, block) == f"the kernel for float32 {runs_anyway}"
    # Triton runs it, so this is no reason to run plain layers.
    assert backends.why_no_kernel(fake(GENERIC)[0], block) is None


@compiles
def test_a_gpu_without_code_in_this_build_is_left_to_others(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "_capability", lambda device: (12, 0))
    monkeypatch.setattr(_C, "cuda_runs_on", lambda index: index == 1, raising=False)
    x, _ = fake(PATCH)
    block = backends.Block.of(PATCH.config, PATCH.clips)
    assert backends.choose(None, x, block) == "triton"
    sentence = "without code for compute capability 12.0; TORCH_CUDA_ARCH_LIST=12.0 at installation"
    with pytest.raises(RuntimeError, match=sentence):
        backends.choose("cuda", x, block)


@compiles
@pytest.mark.parametrize(
    "change",
    [{"stride": 3}, {"padding": (1, 1, 1)}, {"padding": (1, 1, 1, 9)}, {"dilation": 0}],
    ids=str,
)
def test_what_breaks_the_contract_is_said_by_the_contract(built, change):
    x, weights = fake(PATCH)
    with pytest.raises(ValueError, match=f"inverted_residual: {next(iter(change))} must be "):
        inverted_residual(x, weights, **change)
    narrow = replace(weights, clip_dw=(1.0, 0.0))
    with pytest.raises(ValueError, match="clip_dw must be"):
        inverted_residual(x, narrow)
    for broken in (replace(weights, w_dw=weights.w_project), replace(weights, w_project=x)):
        with pytest.raises(ValueError, match="inverted_residual: w_"):
            inverted_residual(x, broken)
    with pytest.raises(ValueError, match="inverted_residual: x must have shape"):
        inverted_residual(torch.empty(3, device="cuda", dtype=torch.float16), weights)


@compiles
def test_explain_names_the_kernel(monkeypatch):
    """On a model that is on the CPU: as if the backend ran there."""
    monkeypatch.setattr(backends, "_why_not_cuda_asked", lambda x, block=None: None)
    others = [b for b in backends.BACKENDS if b.name not in ("cpu", "cuda")]
    cuda = next(b for b in backends.BACKENDS if b.name == "cuda")
    monkeypatch.setattr(backends, "BACKENDS", [replace(cuda, why_not_asked=None), *others])
    monkeypatch.setattr(import_module("mnv2_kernels.fuse.explain"), "BACKENDS", backends.BACKENDS)
    model = mk.mobilenet_v2(0.5).eval().half()
    rows = mk.explain(model, input_shape=(1, 3, 224, 224))
    assert [row.backend for row in rows] == ["cuda"] * 17
    assert {row.kernel for row in rows} == {"patch", "tile"}
    assert "  cuda: patch  " in str(rows) and "  cuda: tile  " in str(rows)
    unsized = mk.explain(model)
    assert {(row.backend, row.kernel) for row in unsized} == {("cuda", None)}
    assert str(unsized).count("  cuda\n") == 17
    # The kernel of a block that had to be asked for, and none where nothing can run.
    single = mk.InvertedResidual(16, 16, backend="cuda").eval()
    (row,) = mk.explain(single, input_shape=(1, 16, 30, 30))
    assert (row.state, row.backend, row.kernel) == ("fused", "cuda", None)
    assert row.reason.startswith("the kernel for float32 has no tensor cores")
    (row,) = mk.explain(single.half(), input_shape=(1, 16, 30, 30))
    assert (row.state, row.backend, row.kernel, row.reason) == ("fused", "cuda", "patch", None)


@compiles
def test_fused_modules_know_what_they_are_chosen_by():
    for clips in ((RELU6, RELU6), (RELU, RELU)):
        block = mk.InvertedResidual(16, 24, stride=2).eval()
        if clips[0] == RELU:
            block.conv[0][2], block.conv[1][2] = torch.nn.ReLU().eval(), torch.nn.ReLU().eval()
        assert block.why_plain() is None
        assert block.chosen_by == backends.Block.of(block.config, (*clips, NO_CLIP))
    assert mk.InvertedResidual(8, 8, expand_ratio=1).chosen_by.clip_expand == NO_CLIP


class Registrations:
    def __init__(self):
        self.keys = []

    def impl(self, name, function, key):
        self.keys.append(key)


@pytest.mark.parametrize(
    ("missing", "cuda_missing", "keys"),
    [(None, None, []), (None, "no CUDA", ["CUDA"]), ("none", "none", ["CPU", "CUDA"])],
)
def test_a_device_has_one_kernel(missing, cuda_missing, keys, monkeypatch):
    monkeypatch.setattr(backends, "missing", missing)
    monkeypatch.setattr(backends, "cuda_missing", cuda_missing)
    library = Registrations()
    backends.load(library, lambda *args: None)
    assert library.keys == keys


@compiles
def test_what_is_said_without_cuda():
    info = _C.build_info()
    said = mk.backends()["cuda"]
    if info["cuda"] is None:
        assert extension.cuda_missing == (
            f"the CUDA kernels are not in this build ({info['why_no_cuda']}); build it again where"
            " torch has CUDA and nvcc is found"
        )
        assert said == f"cannot run: {extension.cuda_missing}"
        with pytest.raises(RuntimeError, match="'cuda' cannot run here: the CUDA kernels are not"):
            inverted_residual(*inputs(PATCH), backend="cuda")
    else:
        assert extension.cuda_missing is None
        assert said.startswith(f"float16, bfloat16 and float32, CUDA {info['cuda']} (")


@compiles
@pytest.mark.parametrize("strict", [True, False])
def test_the_compiler_sees_the_choice(strict, monkeypatch):
    """Traced whole, with image sizes that are symbols: neither way of tracing calls a kernel."""
    monkeypatch.setattr(backends, "_why_not_cuda_asked", lambda x, block=None: None)
    gpu_alone = tuple(b for b in backends.BACKENDS if b.name != "cpu")
    monkeypatch.setattr(backends, "BACKENDS", gpu_alone)
    asked = []
    monkeypatch.setattr(backends._C, "cuda_kernel", lambda *args: asked.append(args) or "tile")
    backends._known_cuda_kernel.cache_clear()
    block = mk.InvertedResidual(16, 16).eval().half()
    x = torch.empty(2, 16, 24, 24, dtype=torch.float16)
    sizes = {0: torch.export.Dim("N", max=64), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
    exported = torch.export.export(block, (x,), dynamic_shapes=(sizes,), strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("mnv2.inverted_residual.default") == 1
    ((*described, height, width, dtype),) = asked
    assert tuple(described) == block.chosen_by[:-2] and dtype == "float16" and height == width == 56
    backends._known_cuda_kernel.cache_clear()
