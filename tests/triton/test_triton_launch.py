"""The arithmetic of a launch, on any machine and for sizes that no machine could hold."""

import inspect
from dataclasses import replace
from itertools import product

import cases
import pytest
import torch
from cases import Case
from triton_cases import CONFIGS, DTYPES, chosen, each_config, each_dtype, plan

from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig
from mnv2_kernels.ops.triton import configs, launch
from mnv2_kernels.ops.triton.configs import PatchConfig
from mnv2_kernels.ops.triton.kernels import geometry, patch

ALL = [case for group in cases.groups().values() for case in group if case.batch > 0]
IDLE = {"num_warps", "num_stages"}


def extents(case: Case, config: PatchConfig) -> tuple[int, int]:
    """Slot rows and columns under a patch, counted by the pixels that its outputs read."""
    block = case.config
    return tuple(
        1 + max(p * block.stride + k * block.dilation for p, k in product(range(patch), kernel))
        for patch, kernel in (
            (config.patch_h, range(block.kernel_size)),
            (config.patch_w, range(block.kernel_size)),
        )
    )


def first_slots(outputs: int, patch: int, stride: int, before: int) -> list[int]:
    """The image row that slot row 0 of each patch lies on."""
    return [first * stride - before for first in range(0, outputs, patch)]


@each_config
def test_safe_slots_are_all_those_inside_in_every_patch(config):
    wrong = []
    for case in ALL:
        constants = plan(case, config).constants
        top, left, _, _ = case.config.padding
        outputs = case.config.output_hw(case.height, case.width)
        sides = zip(
            ("ROWS", "COLUMNS"),
            (case.height, case.width),
            outputs,
            (config.patch_h, config.patch_w),
            (top, left),
            extents(case, config),
            strict=True,
        )
        for name, size, count, patch_size, before, extent in sides:
            firsts = first_slots(count, patch_size, case.config.stride, before)
            inside = [s for s in range(extent) if all(0 <= f + s < size for f in firsts)]
            if list(range(before, constants[f"SAFE_{name}"])) != inside:
                wrong.append(f"{case.id}: {constants[f'SAFE_{name}']} {name}, not {inside}")
    assert not wrong


def test_slots_and_taps_are_those_of_a_convolution():
    """Output p reads slot p * stride + k * dilation through tap k and no other."""
    plain = {f: getattr(geometry, f).fn for f in ("slots", "tap", "is_read")}
    for size, kernel, stride, dilation in product((1, 2, 3, 4), (3, 5), (1, 2), (1, 2)):
        sizes = kernel, stride, dilation
        case = Case(BlockConfig(1, 1, 1, stride, True, kernel, dilation), 40, 40)
        config = replace(CONFIGS["1x1"], patch_h=size)
        extent, _ = extents(case, config)
        assert plain["slots"](size, *sizes) == extent
        read = {p * stride + k * dilation for p in range(size) for k in range(kernel)}
        assert {i for i in range(extent) if plain["is_read"](i, size, *sizes)} == read
        for i, j, p, q in product(range(extent), (0, 1, extent - 1), range(size), (0, size - 1)):
            taps = {
                k * kernel + m
                for k, m in product(range(kernel), repeat=2)
                if p * stride + k * dilation == i and q * stride + m * dilation == j
            }
            found = plain["tap"](i, j, p, q, *sizes)
            assert ({found} - {-1}) == taps, (i, j, p, q, sizes)


@each_config
def test_programs_cover_every_output_once(config):
    for case in ALL:
        planned = plan(case, config)
        patches, height, width, rows_out, columns_out, patch_rows, patch_columns = planned.sizes
        assert (height, width) == (case.height, case.width)
        assert (rows_out, columns_out) == case.config.output_hw(height, width)
        assert (patch_rows - 1) * config.patch_h < rows_out <= patch_rows * config.patch_h
        assert (patch_columns - 1) * config.patch_w < columns_out <= patch_columns * config.patch_w
        assert patches == case.batch * patch_rows * patch_columns
        channels = config.out_tile * config.out_tiles
        groups = -(-case.config.out_channels // channels)
        tiles, rest = divmod(planned.programs, groups)
        assert rest == 0 and (tiles - 1) * config.patches < patches <= tiles * config.patches
        assert (groups - 1) * channels < case.config.out_channels <= groups * channels


def test_a_million_images():
    """One dimension of programs, which holds 2**31 - 1 of them; all counts are exact."""
    block = BlockConfig(16, 96, 24)
    for batch, size in ((10**6, 224), (10**7, 112), (70_000, 7)):
        case = Case(block, size, size, batch)
        planned = plan(case, replace(CONFIGS["2x2"], out_tile=32))
        per_image = (-(-size // 2)) ** 2
        assert planned.sizes[0] == batch * per_image
        assert planned.programs == -(-batch * per_image // 16) < 2**31
        assert all(isinstance(n, int) for n in (planned.programs, *planned.sizes))


def test_constants_are_those_of_the_kernel():
    parameters = inspect.signature(patch.inverted_residual_patch.fn).parameters
    constexprs = {n for n, p in parameters.items() if "constexpr" in str(p.annotation)}
    arguments = [n for n in parameters if n not in constexprs]
    for case, dtype in product(ALL[::50], DTYPES):
        planned = plan(case, chosen(case, dtype), dtype)
        assert set(planned.constants) == constexprs
        assert all(isinstance(c, (int, bool, str)) for c in planned.constants.values())
        # x, six weights and y come before what the plan holds.
        assert 8 + len(planned.sizes) + len(planned.bounds) == len(arguments)


def test_every_field_of_a_configuration_reaches_the_kernel():
    case = Case(BlockConfig(16, 96, 24), 9, 9)
    base = chosen(case)
    changes = {"patches": 128, "patch_h": 5, "patch_w": 5, "chunk": 8, "in_tile": 4, "out_tile": 4}
    changes |= {"out_tiles": 7, "keep_x": not base.keep_x, "half": not base.half}
    assert set(changes) | IDLE == set(PatchConfig.__dataclass_fields__)
    before = plan(case, base).constants
    for field, value in changes.items():
        after = plan(case, replace(base, **{field: value})).constants
        changed = {n for n in after if after[n] != before[n]} - {"SAFE_ROWS", "SAFE_COLUMNS"}
        assert changed == {field.upper()}


def test_bounds_biases_and_blocks_reach_the_kernel():
    case = Case(
        BlockConfig(7, 21, 7, 1, True, 5, 2, (1, 2, 3, 4), False),
        12,
        13,
        biases=(True, False, True),
        clips=((-1.0, 2.0), RELU, NO_CLIP),
    )
    planned = plan(case, CONFIGS["1x1"])
    assert planned.bounds == (-1.0, 2.0, *RELU, *NO_CLIP)
    constants = planned.constants
    assert [constants[f"B_{n}"] for n in ("EXPAND", "DW", "PROJECT")] == [True, False, True]
    names = ("C_IN", "C_HIDDEN", "C_OUT", "KERNEL", "STRIDE", "DILATION", "PAD_TOP", "PAD_LEFT")
    assert [constants[name] for name in names] == [7, 21, 7, 5, 1, 2, 1, 2]
    assert (constants["ZERO_EXPAND"], constants["ZERO_DW"]) == (False, True)


@pytest.fixture
def matmul():
    """PyTorch's switches for matrix products on a GPU; put back afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


@each_dtype
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_switch_for_tf32(precision, dtype, matmul):
    matmul.fp32_precision = precision
    constants = plan(Case(BlockConfig(8, 24, 8), 5, 5), CONFIGS["2x2"], dtype).constants
    allowed = precision == "tf32" and dtype == torch.float32
    assert constants["PRECISION"] == ("tf32" if allowed else "ieee")


def test_rules_give_every_shape_a_configuration():
    """Powers of two, as Triton's tiles must be, whatever the block."""
    blocks = dict.fromkeys(case.config for case in ALL)
    for block, dtype in product(blocks, DTYPES):
        config = configs.fallback(block, dtype).config
        for value in (config.patches, config.chunk, config.in_tile, config.out_tile):
            assert value & (value - 1) == 0, (block.name, config)
        assert config.num_warps in (1, 2, 4, 8) and config.out_tiles >= 1
        assert dtype == torch.float16 or not config.half


def test_committed_tables_hold_configurations_of_their_keys():
    for name in configs.table_names():
        for key, config in configs.load(name).items():
            assert isinstance(config, PatchConfig), (name, key)
            kind = key.split("@")[0].split("-")[-1]
            assert kind in ("tf32", "float16", "bfloat16"), (name, key)
            assert kind == "float16" or not config.half, (name, key)
    assert configs.load("no such table") == {}


def test_keys_tell_blocks_apart_but_not_images():
    block = BlockConfig(16, 96, 24)
    others = [
        replace(block, stride=2),
        replace(block, dilation=2),
        replace(block, kernel_size=5),
        replace(block, in_channels=17),
        BlockConfig(96, 96, 24, expansion=False),
        BlockConfig(96, 96, 24),
    ]
    keys = {configs.key(b, dtype) for b in (block, *others) for dtype in DTYPES}
    assert len(keys) == 7 * 3
    assert configs.key(replace(block, padding=(0, 0, 1, 1)), torch.float32) in keys


def test_residual_and_clips_do_not_change_the_sizes():
    case = Case(BlockConfig(16, 96, 16), 9, 9)
    other = replace(case, config=replace(case.config, residual=True), clips=(RELU6,) * 3)
    assert plan(case, CONFIGS["2x2"]).sizes == plan(other, CONFIGS["2x2"]).sizes
    assert launch.slots(2, 3, 1, 1) == 4
