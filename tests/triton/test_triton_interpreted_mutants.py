"""One change in the source of the Triton kernel must show in the values of a few small blocks.

Each mutant is the source with one text replaced, which must occur exactly once: a mutant that no
longer applies is an error, not a pass. All run in the interpreter, also where there is a GPU.
"""

import mmap
import re
from dataclasses import replace
from functools import partial
from math import inf

import numpy as np
import pytest
import torch
from cases import Case, expect, make_inputs, why_wrong
from special_values import skipping_reference, why_unlike
from torch import Tensor
from triton_cases import KERNEL, QUICK, launch_into, plan, with_biases_in_float
from triton_mutants import SOURCES, interpret, mutate

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import NO_CLIP, RELU6, BlockConfig
from mnv2_kernels.ops.triton import interpreter
from mnv2_kernels.ops.triton.configs import PatchConfig

pytestmark = pytest.mark.sampled(4)


OF_PATCHES = ("geometry", "values", "hidden", "patch")
SMALL = replace(QUICK, patches=16, chunk=16, in_tile=16, out_tile=8, out_tiles=1)
TWO_TILES = replace(SMALL, patch_h=1, out_tiles=2)
RESIDUAL = Case(BlockConfig(20, 28, 20, residual=True), 5, 6, batch=2, clips=(RELU6,) * 3)
STRIDED = Case(BlockConfig(7, 23, 9, stride=2, padding=(0, 1, 1, 2)), 7, 6, batch=3)
# (case, dtype, configuration)
CALLS: dict[str, tuple[Case, torch.dtype, PatchConfig]] = {
    "residual": (RESIDUAL, torch.float32, SMALL),
    "strided, x read again": (STRIDED, torch.float32, replace(TWO_TILES, keep_x=False)),
    "half": (RESIDUAL, torch.float16, replace(TWO_TILES, half=True)),
    "t1": (
        Case(BlockConfig(19, 19, 5, expansion=False, dilation=2, padding=(2, 1, 1, 2)), 5, 6),
        torch.float32,
        SMALL,
    ),
    "clips without zero": (
        replace(STRIDED, batch=1, clips=((1.0, 2.0), (-3.0, inf), NO_CLIP)),
        torch.float32,
        TWO_TILES,
    ),
    "infinite clip": (
        replace(STRIDED, batch=1, clips=(RELU6, (inf, inf), (-2.0, 2.0))),
        torch.float32,
        TWO_TILES,
    ),
    "nan": (replace(RESIDUAL, batch=1), torch.float32, replace(SMALL, patches=32)),
}

PADDED = "e = tl.where((rows & columns)[:, None] != 0, e, 0.0)"
MUTANTS = {
    "no upper clip": ("return tl.minimum(v, upper, propagate_nan=tl.PropagateNan.ALL)", "return v"),
    "no lower clip": ("v = tl.maximum(v, lower, propagate_nan=tl.PropagateNan.ALL)", "v = v + 0"),
    "no clip after the expansion": ("e = activate(e, lower_e, upper_e, CURVE_EXPAND)", "e = e"),
    "no clip after the depthwise": ("d = activate(d, lower_d, upper_d, CURVE_DW)", "d = d"),
    "clips swapped": (
        "e = activate(e, lower_e, upper_e, CURVE_EXPAND)",
        "e = activate(e, lower_d, upper_d, CURVE_EXPAND)",
    ),
    "no clip after the projection": (
        "v = activate(v, lower_project, upper_project, CURVE_PROJECT)",
        "v = v",
    ),
    "no clip of half": ("v = clip(v.to(tl.float16), lower, upper)", "v = v.to(tl.float16)"),
    "no clip of the last half tap": ("d = clip(tl.fma(e, w, d), lower, upper)", "d = d + e * w"),
    "padding not masked": (PADDED, "e = e"),
    "padding of half not masked": ("v = tl.where((rows & columns) != 0, v, 0.0)", "v = v"),
    "padding only of rows": (
        "columns = row_mask if COLUMN_SAFE else column_mask",
        "columns = rows",
    ),
    "padding only of columns": (
        "rows = column_mask if ROW_SAFE else row_mask",
        "rows = column_mask",
    ),
    "rows above the image exist": ("(exists & (row0 + i >= 0) &", "(exists & (row0 + i >= -1) &"),
    "rows below the image exist": ("& (row0 + i < H))", "& (row0 + i <= H))"),
    "columns left of it exist": ("(column0 + j >= 0)", "(column0 + j >= -1)"),
    "columns right of it exist": ("& (column0 + j < W)", "& (column0 + j <= W)"),
    "padding shifted down": ("(PATCH_H * STRIDE) - PAD_TOP", "(PATCH_H * STRIDE) - PAD_LEFT"),
    "padding shifted left": ("(PATCH_W * STRIDE) - PAD_LEFT", "(PATCH_W * STRIDE) - PAD_TOP"),
    "phase of the stride": ("down, right = i - p * stride,", "down, right = i - p * stride - 1,"),
    "taps transposed": (
        "return down // dilation * kernel + right // dilation",
        "return right // dilation * kernel + down // dilation",
    ),
    "taps flipped": (
        "return down // dilation * kernel + right // dilation",
        "return kernel * kernel - 1 - down // dilation * kernel - right // dilation",
    ),
    "dilation forgotten": ("return down // dilation * kernel", "return down // 1 % 3 * kernel"),
    "no bias of the expansion": ("exists_hidden, B_EXPAND)", "exists_hidden, False)"),
    "no bias of the depthwise": ("exists_hidden, B_DW)", "exists_hidden, False)"),
    "no bias of the projection": ("out < C_OUT, B_PROJECT)", "out < C_OUT, False)"),
    "no residual": ("if RESIDUAL:", "if False:"),
    "residual before the clip": (
        "v = activate(v, lower_project, upper_project, CURVE_PROJECT)",
        "v = activate(v + 1, lower_project, upper_project, CURVE_PROJECT) - 1",
    ),
    "residual twice": (
        ".to(tl.float32)\n                tl.store(",
        ".to(tl.float32) * 2\n                tl.store(",
    ),
    "only the last chunk is projected": (
        "dot(d.to(dtype), project_tiles[o], sums[p * OUT_TILES + o], PRECISION)",
        "dot(d.to(dtype), project_tiles[o], sums[p * OUT_TILES + o] * 0, PRECISION)",
    ),
    "first tile of outputs for all": ("project_tiles[o], sums", "project_tiles[0], sums"),
    "first tile of inputs for all": (
        "expand_tiles[k], e, PRECISION",
        "expand_tiles[0], e, PRECISION",
    ),
    "last chunk of hidden channels left out": (
        "for first_hidden in tl.range(0, C_HIDDEN, CHUNK):",
        "for first_hidden in tl.range(0, C_HIDDEN - CHUNK, CHUNK):",
    ),
    "hidden channels that do not exist": (
        "d = tl.where(exists_hidden[None, :], d, 0.0)",
        "d = tl.where(exists_hidden[None, :], d, d)",
    ),
    "weights beyond the last input channel": ("(rows < ROWS)[:, None] &", "(rows >= 0)[:, None] &"),
    "a hidden channel too few": (
        "exists_hidden = hidden < C_HIDDEN",
        "exists_hidden = hidden < C_HIDDEN - 1",
    ),
    "an input channel too few": ("(channels < C_IN)[None, :]", "(channels < C_IN - 1)[None, :]"),
    "an output channel too few": (
        "exists_out = channels < C_OUT",
        "exists_out = channels < C_OUT - 1",
    ),
    "last row not stored": ("(row < H_out)", "(row < H_out - 1)"),
    "last column not stored": ("(column < W_out)", "(column < W_out - 1)"),
    "last patch not computed": ("exists = patch < patches", "exists = patch < patches - 1"),
    "image 0 for all": ("row_step = tl.full", "image = image * 0\n    row_step = tl.full"),
    "height and width swapped": ("(image * H + row0) * W", "(image * W + row0) * H"),
    "patch rows and columns swapped": (
        "// patch_columns % patch_rows)",
        "// patch_rows % patch_rows)",
    ),
    "group of output channels": ("first_out = program % OUT_GROUPS", "first_out = 0 * OUT_GROUPS"),
    "half for float": (
        "tl.float16 if HALF else tl.float32\n    first_slot",
        "tl.float16\n    first_slot",
    ),
    "projection in half": ("dot(d.to(dtype),", "dot(d.to(tl.float16),"),
}


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Makes the interpreter run other sources."""
    return partial(interpret, monkeypatch, tmp_path)


def prepare(name: str) -> tuple[Tensor, FoldedWeights, Case, PatchConfig]:
    case, dtype, config = CALLS[name]
    x, weights = make_inputs(case)
    x, weights = x.to(dtype), with_biases_in_float(weights, dtype)
    if name == "infinite clip":
        weights = replace(weights, w_project=weights.w_project.abs() + 0.1)
    return x, weights, case, config


def why_found(name: str) -> str | None:
    x, weights, case, config = prepare(name)
    clean = expect(case, x, weights)
    if name == "nan":
        x[0, 3, 2, 2] = torch.nan
    # What a kernel leaves out must not be right by what was in memory before.
    channels_last = torch.channels_last
    y = torch.full(clean.truth.shape, 77.0, dtype=x.dtype).to(memory_format=channels_last)
    launch_into(y, x.contiguous(memory_format=channels_last), weights, case, config)
    return why_unlike(y, skipping_reference(x, weights, case), clean)


def test_the_source_itself_passes(use):
    use(SOURCES)
    assert {name: why_found(name) for name in CALLS} == dict.fromkeys(CALLS)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_found(name, use):
    use(mutate(*MUTANTS[name], OF_PATCHES))
    assert any(why_found(call) for call in CALLS)


def test_minima_and_maxima_keep_nan():
    """In the interpreter all do, so that these mutants could not be found by values."""
    calls = re.findall(r"tl\.(?:minimum|maximum)\(.*", SOURCES["values"])
    assert len(calls) >= 2 and all("propagate_nan=tl.PropagateNan.ALL" in c for c in calls)
    instructions = re.findall(r"\b(?:min|max)\.\S*f16x2", SOURCES["values"])
    assert len(instructions) >= 4 and all(".NaN." in i for i in instructions)


FAR = 2**14


def far_images(use, sources: dict[str, str]) -> str | None:
    """The first pixel of each of 12 images of 2**28: their addresses exceed 32 bits.

    Only the pages that are touched take memory; what wraps around finds zeros below the images.
    """
    count, channels, below = 12, 1, 2**32
    used = count * FAR * FAR * channels
    memories = [
        mmap.mmap(-1, 2 * (below + used), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        for _ in range(2)
    ]
    x, y = (
        torch.frombuffer(m, dtype=torch.float16, offset=2 * below, count=used).view(
            count, FAR, FAR, channels
        )
        for m in memories
    )
    case = Case(BlockConfig(channels, 3, channels), 2, 2, batch=count)
    near, weights = make_inputs(case)
    near, weights = near.half(), with_biases_in_float(weights, torch.float16)
    x[:, :2, :2] = near.permute(0, 2, 3, 1)
    planned = plan(case, SMALL, torch.float16)
    # The patches of 2 x 2 images, in images whose other pixels lie far away.
    sizes = (count, FAR, FAR, FAR, FAR, 1, 1)
    constants = planned.constants | {"SAFE_ROWS": 0, "SAFE_COLUMNS": 0, "WHOLE_ROW": 0}
    use(sources)
    interpreter.run(KERNEL, (1,), (x, *weights.tensors(), y, *sizes, *planned.bounds), constants)
    # The same images with a border of the zeros that surround these.
    wide = torch.zeros(count, channels, 3, 3, dtype=torch.float16)
    wide[:, :, :2, :2] = near
    wide_case = replace(case, height=3, width=3)
    expected = expect(wide_case, wide, weights)
    return why_wrong(
        y[:, :2, :2].permute(0, 3, 1, 2),
        replace(expected, truth=expected.truth[:, :, :2, :2]),
    )


def test_addresses_are_64_bit(use):
    """Whatever counts patches, the images that they lie in are counted in 64 bits."""
    narrow = mutate(
        "(patch // patch_columns // patch_rows).to(tl.int64)",
        "(patch // patch_columns // patch_rows).to(tl.int32)",
        OF_PATCHES,
    )
    with np.errstate(all="ignore"):
        assert far_images(use, SOURCES) is None
        assert far_images(use, narrow) is not None
