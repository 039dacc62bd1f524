"""The compiled CUDA op, run on CPU tensors in the emulator; which kernel and backend is chosen."""

import subprocess
from dataclasses import replace
from functools import cache, partial
from importlib import import_module

import cases
import cuda_cases
import emulated_cuda
import emulated_cuda_op
import pytest
import torch
from cases import Case, expect, make_inputs, why_wrong
from test_bad_calls import BAD_CALLS, fill, good_call
from torch import Tensor
from torch._subclasses import FakeTensorMode

import mnv2_kernels as mk
from mnv2_kernels import FoldedWeights, extension, inverted_residual, ops
from mnv2_kernels.block import NO_CLIP, RELU, RELU6, BlockConfig, mobilenet_v2_block_inputs
from mnv2_kernels.extension import module as _C

# The package has a function of that name.
backends = import_module("mnv2_kernels.backends")
REASON = emulated_cuda_op.why_not()
emulates = pytest.mark.skipif(REASON is not None, reason=str(REASON))
compiles = pytest.mark.skipif(_C is None, reason="needs the compiled extension")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

PATCH = Case(BlockConfig(16, 48, 16, residual=True), 21, 23, batch=2)
TILE = Case(BlockConfig(40, 80, 48, stride=2), 9, 10, batch=2)
GENERIC = Case(BlockConfig(5, 19, 7, padding=(0, 2, 1, 1)), 6, 5, batch=2)


def arguments(x: Tensor, weights: FoldedWeights, case: Case) -> tuple:
    return x, *weights.tensors(), *case.settings.values(), *weights.clips()


def inputs(case: Case, dtype: torch.dtype = torch.float16) -> tuple[Tensor, FoldedWeights]:
    """x and weights in dtype, biases in float32."""
    x, weights = make_inputs(case)
    names = ("b_expand", "b_dw", "b_project")
    biases = {name: getattr(weights, name) for name in names}
    return x.to(dtype), replace(weights.to(dtype), **biases)


def test_the_op_compiles_with_the_headers_of_pytorch():
    """The real ones of its CUDA streams too, without the one that only builds with CUDA have."""
    if reason := emulated_cuda.why_not():
        pytest.skip(reason)
    command = [*emulated_cuda_op.compiler(), "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-fsyntax-only"]
    command += ["-Wextra", "-Werror", str(emulated_cuda_op.SOURCES[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@emulates
@each_dtype
@pytest.mark.parametrize("case", [PATCH, TILE, GENERIC], ids=["patch", "tile", "generic"])
def test_values(case, dtype):
    op = emulated_cuda_op.op()
    x, weights = inputs(case, dtype)
    for layout in cases.LAYOUTS.values():
        y = op(*arguments(x.contiguous(memory_format=layout), weights, case))
        assert why_wrong(y, expect(case, x, weights)) is None
        assert y.is_contiguous(memory_format=torch.channels_last)


@emulates
def test_every_option_of_a_block():
    op = emulated_cuda_op.op()
    group = [c for c in cases.groups()["S4"] if c.batch < 4]
    assert len(group) >= 20 and {c.batch for c in group} == {0, 1, 2, 3}
    wrong = []
    for i, case in enumerate(group):
        x, weights = inputs(case, DTYPES[i % 3])
        reason = why_wrong(op(*arguments(x, weights, case)), expect(case, x, weights))
        wrong += [f"{case.id}: {reason}"] if reason else []
    assert not wrong, "\n".join(wrong)


@emulates
def test_biases_of_the_dtype_of_x():
    x, weights = inputs(TILE)
    half = weights.to(torch.float16)
    y = emulated_cuda_op.op()(*arguments(x, half, TILE))
    assert why_wrong(y, expect(TILE, x, half)) is None


def odd_view(tensor: Tensor) -> Tensor:
    """The same numbers one element behind an address that is a multiple of 16."""
    storage = tensor.new_empty(tensor.numel() + 1)[1:]
    view = storage.as_strided(tensor.shape, tensor.stride())
    assert view.data_ptr() % 16 == tensor.element_size()
    return view.copy_(tensor)


@emulates
@pytest.mark.parametrize("case", [PATCH, TILE, GENERIC], ids=["patch", "tile", "generic"])
@pytest.mark.parametrize("odd", range(7))
def test_a_view_may_begin_anywhere(case, odd):
    op = emulated_cuda_op.op()
    x, weights = inputs(replace(case, batch=1))
    x = x.contiguous(memory_format=torch.channels_last)
    args = list(arguments(x, weights, case))
    expected = op(*args)
    args[odd] = odd_view(args[odd])
    assert torch.equal(op(*args), expected)


@emulates
def test_inputs_stay_as_they_are():
    x, weights = inputs(PATCH)
    before = [t.clone() for t in (x, *weights.tensors())]
    emulated_cuda_op.op()(*arguments(x, weights, PATCH))
    assert all(map(torch.equal, before, (x, *weights.tensors())))


@emulates
def test_bad_calls():
    op = emulated_cuda_op.op()
    for error, sentence, changes in BAD_CALLS:
        with pytest.raises(error) as raised:
            op(*(good_call() | fill(changes)).values())
        assert str(raised.value).startswith(f"inverted_residual: {sentence}")


@emulates
def test_what_else_is_refused():
    op = emulated_cuda_op.op()
    x, weights = make_inputs(GENERIC)
    exact = arguments(x.double(), weights.to(torch.float64), GENERIC)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16 for the CUDA ker"):
        op(*exact)
    op.configure(shared_bytes=100)
    try:
        sentence = (
            r"the CUDA kernel generic was not launched for x of shape \[2, 5, 6, 5\], 19 hidden"
            r" channels, kernel size 3, stride 1: said by the emulator"
        )
        with pytest.raises(RuntimeError, match=sentence):
            op(*arguments(x, weights, GENERIC))
    finally:
        op.configure()


OLD_GPU = """
import cases, emulated_cuda_op, test_cuda_op
op = emulated_cuda_op.op()
op.runtime.mnv2_set_capability(75)
x, weights = cases.make_inputs(test_cuda_op.GENERIC)
arguments = test_cuda_op.arguments(x, weights, test_cuda_op.GENERIC)
for i in range(2):
    try:
        op(*arguments)
    except RuntimeError as error:
        print(op.runtime.mnv2_questions(), str(error).splitlines()[0])
print(op(x[:0], *arguments[1:]).shape[0])
"""


@emulates
def test_an_old_gpu_is_refused_and_asked_once(python):
    """In a process of its own: what a GPU is, is remembered."""
    done = python("-c", OLD_GPU)
    assert done.returncode == 0, done.stderr
    sentence = "inverted_residual: x must be on a GPU of compute capability 8.0 or later, got 7.5"
    assert done.stdout.splitlines() == [f"4 {sentence}"] * 2 + ["0"]


def kernel_of(case: Case, dtype: torch.dtype) -> str:
    return backends.cuda_kernel(
        torch.empty((), dtype=dtype).expand(1, case.config.in_channels, case.height, case.width),
        backends.Block.of(case.config, case.clips),
    )


@cache
def blocks_of(kernel: str, dtype: torch.dtype) -> list[Case]:
    """Every case of the tests that this kernel is chosen for."""
    groups = [*cases.groups().values(), cuda_cases.large_images(), cuda_cases.whole_octets()]
    return [case for group in groups for case in group if kernel_of(case, dtype) == kernel]


@compiles
def test_every_kernel_is_chosen_for_many_cases():
    """Those that test_cuda_gpu.py runs."""
    for dtype in DTYPES[:2]:
        assert len(blocks_of("patch", dtype)) >= 40
        assert len(blocks_of("tile", dtype)) >= 200
        assert len(blocks_of("generic", dtype)) >= 200
    assert len(blocks_of("generic", torch.float32)) >= 500


@compiles
def test_which_kernel_runs_a_block():
    blocks = [
        kernel_of(Case(config, size, size), dtype)
        for config, size in mobilenet_v2_block_inputs()
        for dtype in DTYPES[:2]
    ]
    assert set(blocks) == {"patch", "tile"}
    assert {kernel_of(case, torch.float16) for case in cases.groups()["S3"]} >= {"tile", "generic"}
    every = [case for group in cases.groups().values() for case in group]
    assert {kernel_of(case, torch.float32) for case in every} == {"generic"}
    expected = zip((PATCH, TILE, GENERIC), ("patch", "tile", "generic"), strict=True)
    assert all(kernel_of(case, torch.float16) == name for case, name in expected)


@compiles
def test_kernels_are_known_by_the_op_as_by_python():
    """Every argument reaches the choice: the emulator's library makes it from a real call."""
    if reason := emulated_cuda.why_not():
        pytest.skip(reason)
    for group in ("S1-width1", "S2", "S4"):
        for case in cases.groups()[group][::3]:
            x, weights = inputs(case)
            assert emulated_cuda.chosen(x, weights, **case.settings) == kernel_of(
                case, torch.float16
            ), case.id


@compiles
def test_bad_questions_about_kernels():
    block = backends.Block.of(PATCH.config, PATCH.clips)
    with pytest.raises(ValueError, match="dtype must be float16, bfloat16 or float32, got 'int8'"):
        _C.cuda_kernel(*block, 8, 8, "int8")
    assert backends.cuda_kernel(torch.empty(3), block) is None


# ---- The backend


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
    block = ops._block(ops.op_arguments(weights, **case.settings))
    assert block == backends.Block.of(case.config, case.clips)
    name = backends.choose(backend, x, block)
    if name != "reference":
        y = inverted_residual(x, weights, backend=backend, **case.settings)
        assert y.is_cuda and y.dtype == dtype and cases.last_backend() == name
    return name


@compiles
def test_who_runs_by_itself(built, monkeypatch):
    for dtype in DTYPES[:2]:
        assert chosen(PATCH, dtype) == chosen(TILE, dtype) == "cuda"
        assert chosen(GENERIC, dtype) == "triton"
    assert chosen(PATCH, torch.float32) == "reference"
    monkeypatch.setattr(backends, "_tf32_allowed", lambda: True)
    assert chosen(PATCH, torch.float32) == "triton"
    monkeypatch.setattr(backends.triton_kernels, "missing", "no Triton")
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
    monkeypatch.setattr(import_module("mnv2_kernels.report"), "BACKENDS", backends.BACKENDS)
    model = mk.mobilenet_v2(0.5).eval().half()
    rows = mk.explain(model, input_shape=(1, 3, 224, 224))
    assert [row.backend for row in rows] == ["cuda"] * 17
    assert {row.kernel for row in rows} == {"patch", "tile"}
    assert "  cuda: patch  " in str(rows) and "  cuda: tile  " in str(rows)
    unsized = mk.explain(model)
    assert {(row.backend, row.kernel) for row in unsized} == {("cuda", None)}
    assert str(unsized).endswith("  cuda")
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
        block = mk.InvertedResidual(16, 24, stride=2)
        block.block_layers = replace(
            block.block_layers,
            expand=replace(block.block_layers.expand, clip=clips[0]),
            depthwise=replace(block.block_layers.depthwise, clip=clips[1]),
        )
        block._watch()
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
    assert tuple(described) == block.chosen_by and dtype == "float16" and height == width == 56
    backends._known_cuda_kernel.cache_clear()
