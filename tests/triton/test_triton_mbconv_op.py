"""The Triton twin of the op `mbconv`: what PyTorch is told, layouts, the plan of its launches."""

import inspect
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from cases import LAYOUTS, expect, run, why_wrong
from mbconv_blocks import in_dtype, mbconv_cases
from memory_layouts import at_offset, in_memory_order, inside_nan
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from triton_cases import CONFIGS, DEVICE, DTYPES, HAS_GPU, QUICK
from triton_mbconv import BLOCKS, CURVES_ALONE, ODD, inputs, plan

from mnv2_kernels import inverted_residual
from mnv2_kernels.block.fold import FoldedGate
from mnv2_kernels.ops.inverted_residual import op_arguments
from mnv2_kernels.ops.triton import configs
from mnv2_kernels.ops.triton.kernels import gate

OP = torch.ops.mnv2.mbconv_triton.default
MAIN = torch.ops.mnv2.mbconv.default
BOTH = [replace(case, batch=1) for case in (ODD, CURVES_ALONE)]


def arguments(case, dtype=torch.float32, requires_grad=False) -> tuple:
    x, weights = inputs(case, dtype)
    found = (x.to(memory_format=torch.channels_last), *op_arguments(weights, case.config))
    return (*(t.requires_grad_() if requires_grad and torch.is_tensor(t) else t for t in found),)


@pytest.mark.parametrize(
    "utility",
    ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"],
)
def test_opcheck(utility):
    for case, requires_grad in zip(BOTH, (True, False), strict=True):
        opcheck(OP, arguments(case, requires_grad=requires_grad), test_utils=utility)


def test_the_result_is_what_the_fake_kernel_says():
    for case, dtype in product(BOTH, DTYPES):
        args = arguments(case, dtype)
        y, fake = OP(*args), OP(*(t.to("meta") if torch.is_tensor(t) else t for t in args))
        assert (y.shape, y.stride(), y.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_bad_calls():
    args = list(arguments(BOTH[0]))
    for place, value, sentence in (
        (7, args[7].t().contiguous(), r"w_squeeze must have shape \(C_hidden=37, R\)"),
        (15, [5, 0, 0, 0], "curves must be 4 integers from 0 to 4"),
        (17, 2, "scale must be 0 or 1, got 2"),
    ):
        with pytest.raises(ValueError, match=f"^mbconv: {sentence}"):
            OP(*args[:place], value, *args[place + 1 :])


def test_gradients_are_those_of_the_reference():
    for case in BOTH:
        args = arguments(case, requires_grad=True)
        leaves = [t for t in args if torch.is_tensor(t)]
        ours, theirs = (torch.autograd.grad(op(*args).square().sum(), leaves) for op in (OP, MAIN))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_forward_mode_goes_to_the_reference():
    x, weights = inputs(BOTH[0], torch.float32)
    tangent, found = torch.randn_like(x), []
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        for backend in ("triton", "reference"):
            y = inverted_residual(dual, weights, backend=backend, **BOTH[0].settings)
            found.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*found)


@pytest.mark.skipif(HAS_GPU, reason="autocast of the CPU")
def test_autocast_is_in_the_dtype_asked_for():
    for case in BOTH:
        x, weights = inputs(case, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            y = run("triton", x, in_dtype(weights, torch.float32), **case.settings)
        assert torch.equal(y, run("triton", x, weights, **case.settings))


def test_flops_are_those_of_the_main_op():
    for case in list(mbconv_cases())[::40]:
        args = [t.to("meta") if torch.is_tensor(t) else t for t in arguments(case)]
        counted = []
        for op in (OP, MAIN):
            with FlopCounterMode(display=False) as counter:
                op(*args)
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1] > 0


def test_any_layout():
    """Of x, and of every weight at once; nothing is written to either."""
    x, weights = inputs(BOTH[0], torch.float32)
    right = run("triton", x, weights, **BOTH[0].settings)

    def changed(part, change):
        names = [f.name for f in fields(part) if torch.is_tensor(getattr(part, f.name))]
        return replace(part, **{name: change(getattr(part, name)) for name in names})

    with DEVICE:
        for image in (
            *(x.contiguous(memory_format=layout) for layout in LAYOUTS.values()),
            in_memory_order(x, (3, 2, 1, 0)),
            inside_nan(x, (0, 1, 2, 3)),
        ):
            before = image.clone()
            assert torch.equal(run("triton", image, weights, **BOTH[0].settings), right)
            assert torch.equal(image, before)
        for change in (
            lambda t: in_memory_order(t, tuple(range(t.dim()))[::-1]),
            lambda t: inside_nan(t, tuple(range(t.dim())), step=2),
            lambda t: at_offset(t, 3),
        ):
            others = changed(replace(weights, gate=changed(weights.gate, change)), change)
            assert isinstance(others.gate, FoldedGate)
            assert torch.equal(run("triton", x, others, **BOTH[0].settings), right)


def test_missing_biases_and_an_empty_batch():
    for case in BOTH:
        x, weights = inputs(case, torch.float32)
        weights = replace(weights, b_expand=None, b_dw=None, b_project=None)
        if weights.gate is not None:
            weights = replace(weights, gate=replace(weights.gate, b_squeeze=None, b_excite=None))
        y = run("triton", x, weights, **case.settings)
        assert why_wrong(y, expect(case, x, weights)) is None
        empty = run("triton", x[:0], weights, **case.settings)
        assert empty.shape == (0, *y.shape[1:])


def test_constants_are_those_of_the_kernels():
    for case, dtype in product((c for c in BLOCKS.values() if c.config.squeeze_channels), DTYPES):
        launches = plan(case, configs.of_sums(case.config, dtype, DEVICE), dtype)
        kernels = {
            "sums": (gate.depthwise_sums, 7),
            "excitation": (gate.excitation, 6),
            "projection": (gate.gated_projection, 6),
        }
        for name, (kernel, tensors) in kernels.items():
            launch = getattr(launches, name)
            parameters = inspect.signature(kernel.fn).parameters
            constexprs = {n for n, p in parameters.items() if "constexpr" in str(p.annotation)}
            assert set(launch.constants) == constexprs
            values = tensors + len(launch.sizes) + len(launch.bounds)
            assert values == len(parameters) - len(constexprs), name


def test_programs_cover_every_output_once():
    for case, config in product(list(mbconv_cases())[::4], CONFIGS.values()):
        block = case.config
        if not block.squeeze_channels:
            continue
        launches = plan(case, config, torch.float32)
        height, width = block.output_hw(case.height, case.width)
        patches = -(-height // config.patch_h) * -(-width // config.patch_w)
        assert 0 <= launches.image_tiles * config.patches - patches < config.patches
        assert launches.sums.programs == case.batch * launches.image_tiles
        assert launches.excitation.programs == case.batch
        constants, pixels = launches.projection.constants, case.batch * height * width
        groups = -(-block.out_channels // constants["OUT_TILE"])
        tiles, rest = divmod(launches.projection.programs, groups)
        assert rest == 0 and 0 <= tiles * constants["PIXELS"] - pixels < constants["PIXELS"]
        assert launches.excitation.constants["HIDDEN"] >= block.hidden_channels


def test_a_million_images():
    launches = plan(replace(ODD, height=112, width=112), QUICK, torch.float32, 10**6)
    assert launches.sums.programs < 2**31 and launches.projection.programs < 2**31
    assert launches.projection.sizes == (10**6 * 56 * 56, 56 * 56)


def test_other_convolutions_are_refused():
    for case in mbconv_cases():
        block = case.config
        if not (block.dense or block.kernel_size > 5 or block.dilation > 2):
            continue
        x, weights = inputs(case, torch.float32)
        with pytest.raises(RuntimeError, match="'triton' cannot run here: there is no kernel for"):
            inverted_residual(x, weights, backend="triton", **case.settings)
        with pytest.raises(RuntimeError, match="^mbconv: Triton's kernels take a depthwise of"):
            OP(x, *op_arguments(weights, block))
