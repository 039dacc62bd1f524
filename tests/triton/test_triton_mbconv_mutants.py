"""One change in the kernels of curves and gates must show in the values of a few small blocks.

As test_triton_interpreted_mutants.py, whose blocks have neither.
"""

from dataclasses import replace
from functools import partial
from math import inf

import pytest
from cases import expect, why_wrong
from triton_cases import CONFIGS
from triton_mbconv import BLOCKS, MANY, run_config
from triton_mutants import SOURCES, interpret, mutate

from mnv2_kernels.block.config import NO_CLIP

pytestmark = pytest.mark.sampled(12)

CALLS = {"odd": BLOCKS["odd"], "t1": replace(BLOCKS["t1"], batch=2)}
# Curves that the other blocks do not have where they would show.
CALLS["gelu"] = replace(CALLS["t1"], between=(NO_CLIP, "gelu", NO_CLIP), scale="hardsigmoid")
CALLS["residual"] = BLOCKS["residual"]
CALLS["infinite squeeze"] = replace(CALLS["odd"], batch=1)
CALLS["many"] = MANY
# Several tiles and chunks.
CONFIG = replace(CONFIGS["1x2"], patches=16)

GATE, VALUES = ("gate",), ("values",)
MUTANTS = {
    # The first pass over the pixels.
    "image 0 for all": (GATE, "image = (program // image_tiles)", "image = 0 * (program)"),
    "first tile of an image for all": (GATE, "patch = program % image_tiles *", "patch = 0 *"),
    "no curve after the depthwise": (
        GATE,
        "activate(depthwise[p * PATCH_W + q], lower_dw, upper_dw, CURVE_DW)",
        "depthwise[p * PATCH_W + q]",
    ),
    "pixels outside are summed": (GATE, "tl.where(inside[:, None], d, 0.0)", "d"),
    "only the last pixel is summed": (GATE, "total += tl.where(inside", "total = tl.where(inside"),
    "sums of another tile": (
        GATE,
        "place = program.to(tl.int64) * C_HIDDEN",
        "place = (program // 2).to(tl.int64) * C_HIDDEN",
    ),
    "the last row is not kept": (GATE, "(row < H_out)", "(row < H_out - 1)"),
    "the last column is not kept": (GATE, "(column < W_out)", "(column < W_out - 1)"),
    # The gate.
    "the first tiles alone": (GATE, "while first < image_tiles:", "while first < 1:"),
    "tiles of another image": (GATE, "(image * image_tiles + tile)", "(0 * image_tiles + tile)"),
    "tiles of the next image too": (GATE, "(tile < image_tiles)", "(tile < image_tiles + 1)"),
    "mean over one pixel more": (
        GATE,
        "total / image_pixels.to(tl.float32)",
        "total / (image_pixels + 1).to(tl.float32)",
    ),
    "mean over padding": (
        GATE,
        "total / image_pixels.to(tl.float32)",
        "total / (image_pixels + 13).to(tl.float32)",
    ),
    "no bias of the squeeze": (GATE, "exists_squeezed, B_SQUEEZE", "exists_squeezed, False"),
    "no bias of the excitation": (GATE, "exists, B_EXCITE", "exists, False"),
    "no curve after the squeeze": (
        GATE,
        "B_SQUEEZE), lower, upper, CURVE)",
        "B_SQUEEZE), lower, upper, 1)",
    ),
    "squeezed channels that do not exist": (GATE, "s = tl.where(exists_squeezed, s, 0.0)", "s = s"),
    "the last squeezed channels alone": (GATE, "z += summed", "z = summed"),
    "the other scale": (GATE, "if SCALE == 0 else", "if SCALE == 1 else"),
    # The second pass.
    "no gate": (GATE, "d *= tl.load(of_image", "d += 0 * tl.load(of_image"),
    "the gate of image 0": (
        GATE,
        "gate + (pixel // image_pixels * C_HIDDEN)",
        "gate + (pixel * 0 * C_HIDDEN)",
    ),
    "the gate of another channel": (
        GATE,
        "tl.load(of_image + hidden[None, :]",
        "tl.load(of_image + (hidden ^ 1)[None, :]",
    ),
    "pixels beyond the last": (GATE, "exists = pixel < pixels", "exists = pixel < pixels - 1"),
    "the first outputs for all": (GATE, "out = program % OUT_GROUPS *", "out = 0 *"),
    "an output channel too few": (GATE, "exists_out = out < C_OUT", "exists_out = out < C_OUT - 1"),
    "no bias of the projection": (GATE, "exists_out, B_PROJECT", "exists_out, False"),
    "no curve after the projection": (GATE, "v = activate(v, lower, upper, CURVE)", "v = v"),
    "no residual": (GATE, "if RESIDUAL:", "if False:"),
    "the last chunk alone": (GATE, "weight, v, PRECISION", "weight, 0 * v, PRECISION"),
    # Curves.
    "hardswish with a clip at 5": (VALUES, "clip(v + 3.0, 0.0, 6.0)", "clip(v + 3.0, 0.0, 5.0)"),
    "silu to another base": (VALUES, "z * -1.4426950408889634", "z * -1.0"),
    "gelu of another width": (VALUES, "v * 0.7071067811865476", "v * 0.75"),
    "gelu_tanh without a cube": (VALUES, "+ 0.07135481627260025 * v * v", ""),
    "curves swapped": (VALUES, "if CURVE == 2:", "if CURVE == 4:"),
}


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Makes the interpreter run other sources."""
    return partial(interpret, monkeypatch, tmp_path)


def why_found(name: str) -> str | None:
    case = CALLS[name]
    x, weights = case.inputs()
    x[1:] *= 3
    if name == "infinite squeeze":
        positive = weights.gate.w_excite.abs() + 0.1
        gate = replace(weights.gate, squeeze=(inf, inf), w_excite=positive)
        weights = replace(weights, gate=gate)
    expected = expect(case, x, weights)
    config = CONFIGS["1x1"] if name == "many" else CONFIG
    return why_wrong(run_config(x, weights, case, config), expected)


def test_the_sources_themselves_pass(use):
    use(SOURCES)
    assert {name: why_found(name) for name in CALLS} == dict.fromkeys(CALLS)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_found(name, use):
    modules, old, new = MUTANTS[name]
    use(mutate(old, new, modules))
    assert any(why_found(call) for call in CALLS)
