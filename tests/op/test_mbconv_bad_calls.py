"""Wrong arguments of the op `mbconv`: a sentence for each."""

import re
from dataclasses import replace
from math import nan

import cases
import pytest
import torch
from bad_calls import BAD_CALLS, fill, good_call
from mbconv_blocks import GATED
from torch import Tensor

import mnv2_kernels as mk
from mnv2_kernels.block.config import RELU, RELU6

pytestmark = pytest.mark.usefixtures("one_thread")

OP = torch.ops.mnv2.mbconv.default
BACKWARD = torch.ops.mnv2.mbconv_backward.default
GATE = ("w_squeeze", "b_squeeze", "w_excite", "b_excite")
CALLERS = {
    "cpu": lambda call: OP(*call),
    "meta": lambda call: OP(*(t.to("meta") if isinstance(t, Tensor) else t for t in call)),
    "backward": lambda call: BACKWARD(torch.ones(2, 8, 6, 7), *call, [False] * 11),
}


def good_mbconv() -> dict:
    """As `good_call`, with a gate of 6 channels."""
    call = good_call()
    shapes = ((24, 6), (6,), (6, 24), (24,))
    gate = dict(zip(GATE, map(torch.randn, shapes), strict=True))
    clips = [call.pop(name) for name in ("clip_expand", "clip_dw", "clip_project")]
    tensors = {name: v for name, v in call.items() if isinstance(v, Tensor)}
    rest = {name: v for name, v in call.items() if name not in tensors}
    bounds = [bound for clip in (*clips, RELU) for bound in clip]
    return {**tensors, **gate, **rest, "curves": [0, 1, 4, 0], "bounds": bounds, "scale": 1}


def bad_mbconv():
    kernels = "with k 3, 5 or 7, or (k, k, C_in, C_hidden) with k 1, 3 or 5, got "
    dilations = "must be from 1 to 72 where k is 3, got "
    for error, sentence, changes in BAD_CALLS:
        is_dense = len(changes.get("w_dw", ())) == 4
        if not any(name.startswith("clip") for name in changes) and not is_dense:
            sentence = sentence.replace("with k 3 or 5, got ", kernels)
            sentence = sentence.replace("dilation must be 1 or 2, got ", f"dilation {dilations}")
            yield error, sentence, fill(changes)
    for dilation in (73, 2**40):
        yield ValueError, f"dilation {dilations}{dilation}", {"dilation": dilation}
    large = {"w_dw": torch.zeros(7, 7, 24), "dilation": 25}
    yield ValueError, "dilation must be from 1 to 24 where k is 7, got 25", large
    zeros = torch.zeros
    no_gate = dict.fromkeys(GATE)
    dense = {**no_gate, "w_expand": None, "b_expand": None, "w_dw": zeros(3, 3, 8, 24)}
    for shape in ((7, 7, 8, 24), (3, 5, 8, 24), (2, 2, 8, 24), (1, 1, 24), (3, 3, 1, 8, 24)):
        sentence = f"w_dw must have shape (k, k, C_hidden) {kernels}{shape}"
        yield ValueError, sentence, dense | {"w_dw": zeros(shape)}
    sentence = "w_dw must have shape (3, 3, C_in=8, C_hidden), got (3, 3, 7, 24)"
    yield ValueError, sentence, dense | {"w_dw": zeros(3, 3, 7, 24)}
    where = "where w_dw has four dimensions"
    for name in ("w_expand", "b_expand"):
        value = {name: good_mbconv()[name]}
        yield ValueError, f"w_expand and b_expand must be None {where}", dense | value
    gate = {name: good_mbconv()[name] for name in GATE}
    yield ValueError, f"w_squeeze must be None {where}", dense | gate
    padding = {"dilation": 2, "padding": [2] * 4}
    yield ValueError, f"dilation must be 1 {where}, got 2", dense | padding
    sentence = "w_squeeze must have shape (C_hidden=24, R) with R at least 1, got "
    for shape in ((24,), (23, 6), (6, 24, 1), (24, 0), ()):
        yield ValueError, f"{sentence}{shape}", {"w_squeeze": zeros(shape)}
    sentence = "w_excite must have shape (R=6, C_hidden=24), got "
    for shape in ((24,), (6, 23), (24, 6), (6, 24, 1), ()):
        yield ValueError, f"{sentence}{shape}", {"w_excite": zeros(shape)}
    yield ValueError, f"{sentence}None", {"w_excite": None}
    sentence = "b_squeeze must have shape (R=6,), got "
    for shape in ((24,), (6, 1), (), (0,)):
        yield ValueError, f"{sentence}{shape}", {"b_squeeze": zeros(shape)}
    sentence = "b_excite must have shape (C_hidden=24,), got "
    for shape in ((6,), (24, 1), (), (0,)):
        yield ValueError, f"{sentence}{shape}", {"b_excite": zeros(shape)}
    for name in GATE[1:]:
        others = {other: None for other in GATE if other != name}
        yield ValueError, f"{name} must be None where w_squeeze is None", others
    for name in GATE:
        value = good_mbconv()[name]
        yield TypeError, f"{name} must be a dense floating-point", {name: value.int()}
        yield TypeError, f"{name} must have the dtype of x, ", {name: value.double()}
    sentence = "curves must be 4 integers from 0 to 4, got "
    for curves in ([5, 0, 0, 0], [0, 0, 0, -1], [0] * 3, [0] * 5, [2**40] * 4):
        yield ValueError, f"{sentence}{curves}", {"curves": curves}
    sentence = "bounds must be 4 times lower, upper with lower <= upper, got ["
    for bounds in ([6.0, 0.0] * 4, [0.0, 6.0] * 3, [0.0, nan] * 4, [0.0, 6.0] * 5, [0.0] * 7):
        yield ValueError, sentence, {"bounds": bounds}
    for scale in (-1, 2, 2**40):
        yield ValueError, f"scale must be 0 or 1, got {scale}", {"scale": scale}


@pytest.mark.parametrize("caller", CALLERS)
def test_bad_calls(caller):
    call = good_mbconv()
    before = OP(*call.values())
    wrong = []
    for error, sentence, changes in bad_mbconv():
        try:
            CALLERS[caller]((call | changes).values())
            wrong.append(f"accepted: {sentence}")
        except error as raised:
            if not str(raised).startswith(f"mbconv: {sentence}"):
                wrong.append(f"{raised}\n  expected: {sentence}")
    assert not wrong, "\n".join(wrong)
    assert torch.equal(OP(*call.values()), before)


def test_bad_calls_of_the_backward_op():
    call = [*good_mbconv().values()]
    grad_y = torch.ones(2, 8, 6, 7)
    with pytest.raises(ValueError, match="^mbconv: grad_y must have shape .2, 8, 6, 7., got"):
        BACKWARD(grad_y[1:], *call, [True] * 11)
    with pytest.raises(TypeError, match="^mbconv: grad_y must be a dense floating-point"):
        BACKWARD(grad_y.int(), *call, [True] * 11)
    call[10] = None
    with pytest.raises(ValueError, match="^mbconv: needs_grad must be False for b_excite, which"):
        BACKWARD(grad_y, *call, [True] * 11)


def bad_kinds():
    """Sentence and weights."""
    weights = GATED.inputs()[1]
    known = "two numbers or one of hardswish, silu, gelu, gelu_tanh"
    for name in ("clip_expand", "clip_dw", "clip_project"):
        for other in ("swish", "", "HardSwish", None, 6.0, ("silu",)):
            yield f"{name} must be {known}, got {other!r}", replace(weights, **{name: other})
    for other in (1, "gate", weights.gate.tensors(), weights.gate.w_squeeze):
        sentence = f"gate must be a FoldedGate, got {type(other).__name__}"
        yield sentence, replace(weights, gate=other)
    for name in GATE:
        for other in (1, "w", [1.0], *(() if name.startswith("b_") else (None,))):
            gate = replace(weights.gate, **{name: other})
            sentence = f"{name} must be a tensor, got {type(other).__name__}"
            yield sentence, replace(weights, gate=gate)
    for other in ("swish", None, 6.0):
        gate = replace(weights.gate, squeeze=other)
        yield f"squeeze must be {known}, got {other!r}", replace(weights, gate=gate)
    for other in ("tanh", None, 0, ["sigmoid"]):
        gate = replace(weights.gate, scale=other)
        sentence = f"scale must be one of sigmoid, hardsigmoid, got {other!r}"
        yield sentence, replace(weights, gate=gate)


@pytest.mark.parametrize("name", [n for n in ("cpu", "reference") if n in cases.backends()])
def test_arguments_of_another_kind(name):
    x = GATED.inputs()[0]
    for sentence, weights in bad_kinds():
        with pytest.raises(TypeError, match=f"^inverted_residual: {re.escape(sentence)}$"):
            mk.inverted_residual(x, weights, backend=name, **GATED.settings)


def test_clips_beside_curves():
    x, weights = GATED.inputs()
    for clip in ((), (0.0,), (6.0, 0.0), (0.0, 1.0, 2.0)):
        sentence = "^inverted_residual: clip_dw must be .lower, upper. with lower <= upper, got"
        with pytest.raises(ValueError, match=sentence):
            mk.inverted_residual(x, replace(weights, clip_dw=clip), **GATED.settings)
    whole = mk.inverted_residual(x, replace(weights, clip_dw=[0, 6]), **GATED.settings)
    assert torch.equal(
        whole, mk.inverted_residual(x, replace(weights, clip_dw=RELU6), **GATED.settings)
    )
