"""One change in the source of a CUDA kernel must be found by a few small calls on the emulator.

Each mutant is the source with one text replaced, which must occur exactly once: a mutant that no
longer applies is an error, not a pass.
"""

import re
from dataclasses import replace
from functools import cache
from math import inf

import pytest
import torch
from cases import Case, expect
from cuda_cases import make_inputs, needs_emulator, why_far_is_wrong
from emulated_cuda import H200, KERNELS, ROOT, EmulatorError, Library
from special_values import skipping_reference, why_unlike

from mnv2_kernels.block.config import NO_CLIP, RELU, RELU6, BlockConfig

pytestmark = [pytest.mark.sampled(4), needs_emulator]
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
RESIDUAL, STRIDED = BlockConfig(24, 72, 24, residual=True), BlockConfig(16, 56, 24, 2)
UNEVEN = replace(STRIDED, padding=(0, 1, 1, 2))
ODD = BlockConfig(7, 37, 9, stride=2, padding=(0, 1, 1, 2))
FEW = BlockConfig(24, 24, 24, expansion=False, residual=True)
FEW_STRIDED = BlockConfig(16, 16, 8, 2, expansion=False)
T1 = BlockConfig(40, 40, 24, 1, False, 5, 2, padding=(4, 3, 2, 4))
# (case, dtype, multiprocessors) by kernel.
CALLS: dict[str, list[tuple[Case, torch.dtype, int]]] = {
    "patch": [
        (Case(RESIDUAL, 21, 22, batch=5, clips=(RELU6,) * 3), HALF, 1),
        (Case(UNEVEN, 45, 42, clips=(RELU, RELU6, NO_CLIP)), HALF, 132),
        (Case(replace(RESIDUAL, in_channels=8, residual=False), 23, 20), BFLOAT, 1),
        (Case(FEW, 21, 22, clips=(NO_CLIP, RELU6, NO_CLIP)), HALF, 1),
        (Case(replace(FEW_STRIDED, padding=(0, 1, 1, 2)), 41, 44), BFLOAT, 132),
    ],
    "tile": [
        (Case(RESIDUAL, 5, 6, batch=3, clips=(RELU6,) * 3), HALF, 132),
        (Case(RESIDUAL, 11, 37, batch=2, clips=(RELU, RELU6, NO_CLIP)), BFLOAT, 1),
        (Case(replace(UNEVEN, hidden_channels=136), 9, 8, batch=2), BFLOAT, 132),
        (Case(T1, 7, 9, batch=2, clips=(NO_CLIP, (-0.5, 3.0), RELU)), HALF, 132),
        (Case(replace(T1, in_channels=136, hidden_channels=136), 9, 8), BFLOAT, 1),
        (Case(BlockConfig(136, 136, 32, expansion=False), 7, 7), HALF, 1),
        (Case(BlockConfig(64, 384, 64, residual=True), 14, 14, batch=2), HALF, 132),
        (Case(BlockConfig(64, 392, 72), 7, 7), BFLOAT, 132),
        # Weights that do not exist, times clips that are infinite.
        (Case(STRIDED, 7, 6, clips=(RELU6, (inf, inf), (-2.0, 2.0))), BFLOAT, 132),
        # A warp has a slice by itself, and a block of threads several images.
        (Case(BlockConfig(24, 136, 24), 14, 14, 4, clips=(RELU6, (-0.5, 3.0), RELU)), HALF, 1),
        (Case(RESIDUAL, 9, 9, batch=7), HALF, 1),
    ],
    "generic": [
        (Case(BlockConfig(20, 29, 20, residual=True), 23, 9, 2, clips=(RELU6,) * 3), SINGLE, 1),
        (Case(replace(ODD, out_channels=70), 7, 6, batch=3), HALF, 132),
        (Case(BlockConfig(150, 70, 300), 9, 11), SINGLE, 1),
        (Case(T1, 7, 9, batch=2, clips=(NO_CLIP, (-0.5, 3.0), RELU)), BFLOAT, 132),
        # Weights that do not exist, times clips that are infinite.
        (Case(ODD, 7, 6, clips=(RELU6, (inf, inf), (-2.0, 2.0))), SINGLE, 132),
    ],
}

MUTANTS = {
    "patch": {
        "images in 32 bits": (
            "(at.image * call.H + first_row + warp) * row_elements",
            "static_cast<int>((at.image * call.H + first_row + warp) * row_elements)",
        ),
        "no barrier behind the copies": (
            "copy_async_wait<0>();\n        block_barrier();",
            "copy_async_wait<0>();",
        ),
        "no wait": ("copy_async_wait<0>();", "copy_async_wait<1>();"),
        "no barrier ahead of the next tile": ("block_barrier();\n    }\n}", "}\n}"),
        "bias above the image": ("return row[r] ? upper[c] : Upper{0};", "return upper[c];"),
        "bias beside the image": ("? expanded : Upper{0};", "? expanded : expanded;"),
        "a row too many": ("(first_row + row) < height", "(first_row + row) <= height"),
        "a column too many": ("(first_col + col) < columns", "(first_col + col) <= columns"),
        "a column of y too many": ("= col < cols ? channels", "= col <= cols ? channels"),
        "rows of y left out": (" - 1) / Sizes::kRows + 1;", " - 1) / Sizes::kRows;"),
        "channels that x does not have": ("octet * 8 < channels ?", "true ?"),
        "rows that w_expand does not have": ("= row < call.in_channels;", "= true;"),
        "taps transposed": ("tap_row * 3 + tap_col, value", "tap_col * 3 + tap_row, value"),
        "ReLU ahead of the last tap": ("tap == 8 ?", "tap == 7 ?"),
        "no upper clip of sums": ("minimum<T>(sum[h][pixel], upper.sum_pair)", "sum[h][pixel]"),
        "biases of a second pixel exchanged": (
            "expand[h].x, expand[h].y, expand[h].x, expand[h].y",
            "expand[h].x, expand[h].y, expand[h].y, expand[h].x",
        ),
        "channels that do not exist": ("twice ? pixels - 16 : pixels", "pixels"),
        "channels in another order": ("place % 8 / 2 * 4", "place % 4 / 2 * 4"),
        "no clip of outputs": ("clip.lower != -INFINITY ||", "false &&"),
        "operand transposed": ("w[0] = last[0], w[1] = last[1]", "w[0] = last[1], w[1] = last[0]"),
        "pixels and channels exchanged": (
            "part / 2, 2 * i + part % 2",
            "part % 2, 2 * i + part / 2",
        ),
        "no residual": ("&& call.residual)", "&& false)"),
        "pixels of other patches": (
            "lane / 8 % 2 * Sizes::kIn * 2",
            "lane / 16 * Sizes::kIn * 2",
        ),
    },
    "tile": {
        "pixels in 32 bits": (
            "x + of_x * call.in_channels;",
            "x + static_cast<int>(of_x * call.in_channels);",
        ),
        "no barrier behind the copies": (
            "copy_async_wait<0>();\n        block_barrier();\n        if (chunk <",
            "copy_async_wait<0>();\n        if (chunk <",
        ),
        "no wait for weights": (
            "copy_async_wait<0>();\n        block_barrier();\n        if (chunk <",
            "block_barrier();\n        if (chunk <",
        ),
        "no barrier ahead of a warp's depthwise": ("warp_barrier();", ""),
        "no barrier ahead of the depthwise of several": (
            "} else {\n            block_barrier();",
            "} else {",
        ),
        "one buffer of w_expand": ("buffer * plan.expand_bytes", "0 * plan.expand_bytes"),
        "one buffer of w_project": ("buffer * plan.project_bytes", "0 * plan.project_bytes"),
        "one buffer of taps": ("buffer * plan.dw_bytes", "0 * plan.dw_bytes"),
        "one buffer of results": ("plan.d + buffer * plan.d_bytes", "plan.d + 0 * plan.d_bytes"),
        "one buffer of pixels": ("buffer * plan.e_bytes)", "0 * plan.e_bytes)"),
        "no zeros around the image": ("write_zeros(plan, shared + plan.e);", ""),
        "pixels that fill up a unit in the image": ("plan.e_slice / 16 - 16 + pixel", "pixel"),
        "channels that do not exist": ("if (at.high >= channels) {", "if (false) {"),
        "rows of w_expand that do not exist": (
            "write_zero_weights(call, plan, chunk_weights",
            "if (false) write_zero_weights(call, plan, chunk_weights",
        ),
        "an image too many": (
            "image < at.images && at.row",
            "image <= at.images && at.row",
        ),
        "a column of y too many": ("at.col + col < call.W_out;", "at.col + col <= call.W_out;"),
        "rows that w_project does not have": ("row < channels ?", "row <= channels ?"),
        "columns that w_project does not have": ("octet < valid ? 16 : 0", "16"),
        "no lower clip": (
            "minimum<T>(maximum<T>(pack<T>(low, high), clip.lower), clip.upper)",
            "minimum<T>(pack<T>(low, high), clip.upper)",
        ),
        "one lower bound for two": ("lower == 0 && call.clip_dw", "lower == 0 || call.clip_dw"),
        "padding above left out": ("at.halo_row + row) * plan.e_row", "row) * plan.e_row"),
        "rows below the image": ("min(row + plan.in_rows, call.H)", "(row + plan.in_rows)"),
        "an output that is not there": ("if (s < outputs)", "if (s <= outputs)"),
        "sums begun with zeros": ("sums[s] = bias;", "sums[s] = Sums{};"),
        "no residual": ("if (call.residual) low += unpack", "if (false) low += unpack"),
        "no barrier ahead of a chunk of a cluster": (
            "block_barrier();\n        if (first > 0) {",
            "if (first > 0) {",
        ),
        "no cluster barrier ahead of the gathering": (
            "cluster_barrier();\n        if (chunk",
            "block_barrier();\n        if (chunk",
        ),
        "no cluster barrier behind the gathering": ("cluster_barrier_relaxed();\n", "\n"),
        "no wait in a cluster": (
            "copy_async_wait<1>();\n        cluster_barrier_relaxed();",
            "copy_async_wait<2>();\n        cluster_barrier_relaxed();",
        ),
        "gathered from this block": ("(place + plan.d, rank + i)", "(place + plan.d, 0)"),
        "rows of matrices exchanged": (
            "sums[m][n][0] = sums[m][n][2] = bias.x;",
            "sums[m][n][0] = sums[m][n][1] = bias.x;",
        ),
        "rows of w_project in order": (
            "call.expansion ? channel % 8 / 2 * 4 + channel % 2 + channel / 8 * 2 : channel",
            "channel",
        ),
        "channels of a lane in order": ("low + (call.expansion ? 8 : 2)", "low + 2"),
    },
    "generic": {
        "pixels in 32 bits": (
            ": ((at.image * call.H + row) * call.W + col) * call.in_channels",
            ": static_cast<int>(((at.image * call.H + row) * call.W + col) * call.in_channels)",
        ),
        "no barrier ahead of a slice": ("block_barrier();  // The slice", "// The slice"),
        "no barrier behind a slice": (
            "tile.x_pitch);\n            block_barrier();",
            "tile.x_pitch);",
        ),
        "no barrier behind the table": (
            "shared + tile.pixels);\n        block_barrier();",
            "shared + tile.pixels);",
        ),
        "no barrier ahead of the depthwise": ("block_barrier();\n            convolve", "convolve"),
        "no barrier behind w_project": ("w_project);\n        block_barrier();", "w_project);"),
        "no barrier ahead of the next w_project": ("terms);\n        block_barrier();", "terms);"),
        "bias outside the image": (
            "if (load_shared<uint32_t>(table + pixels[i] * 4) != kOutside)",
            "",
        ),
        "a row too many": ("row < call.H &&", "row <= call.H &&"),
        "a column too many": ("col >= 0 &&", "col >= -1 &&"),
        "channels that do not exist": ("left > 1 ? clip", "left > 0 ? clip"),
        "a channel of y too many": ("channel >= end_channel", "channel > end_channel"),
        "bias of the next channel": ("sums[i][2] + bias.z", "sums[i][2] + bias.w"),
        "the first image for all": ("image = tiles / tile.tile_cols / tile.tile_rows", "image = 0"),
        "no dilation": ("step = dilation * (", "step = ("),
        "a row of weights too many": ("&& row < all_rows", "&& row <= all_rows"),
        "no residual": ("if (call.residual) value", "if (false) value"),
    },
}


@cache
def source(kernel: str) -> str:
    """The kernel's file with the parts that are its own put in place."""
    folder = ROOT / "csrc/cuda" / kernel

    def part(match: re.Match) -> str:
        return inlined(folder / match[1]).replace("#pragma once", "")

    included = set()

    def inlined(path) -> str:
        if path in included:
            return ""
        included.add(path)
        return re.sub(r'^#include "(\w+\.cuh)"$', part, path.read_text(), flags=re.M)

    return inlined(folder / f"{kernel}.cu")


def why_found(library: Library) -> str | None:
    """What is wrong with one of the kernel's calls."""
    for case, dtype, multiprocessors in CALLS[library.kernel]:
        x, weights = make_inputs(case, dtype)
        if case.clips[1] == (inf, inf):
            weights = replace(weights, w_project=weights.w_project.abs() + 0.1)
        device = replace(H200, multiprocessors=multiprocessors)
        try:
            y = library.run(x, weights, **case.settings, device=device, schedule="random_fiber")
        except EmulatorError as error:
            return str(error)
        counts = library.counts
        if counts.passes != counts.matrices:
            return f"bank conflicts: {counts}"
        truth = skipping_reference(x, weights, case)
        if reason := why_unlike(y, truth, expect(case, x, weights)):
            return reason
    try:
        return why_far_is_wrong(library)
    except EmulatorError as error:
        return str(error)


def library_of(kernel: str, text: str) -> Library:
    # Whichever takes less time to compile and run: one compiles for long and runs little.
    flag = "-O0" if kernel == "patch" else "-O1"
    return Library(kernel, (flag,), {ROOT / f"csrc/cuda/{kernel}/{kernel}.cu": text})


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_source_itself_passes(kernel):
    assert why_found(library_of(kernel, source(kernel))) is None


@pytest.mark.parametrize(
    "kernel, name", [(kernel, name) for kernel in KERNELS for name in MUTANTS[kernel]]
)
def test_every_mutant_is_found(kernel, name):
    old, new = MUTANTS[kernel][name]
    text = source(kernel)
    assert text.count(old) == 1, f"{text.count(old)} times in the source: {old}"
    assert why_found(library_of(kernel, text.replace(old, new)))
