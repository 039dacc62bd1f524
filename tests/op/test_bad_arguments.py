"""Arguments of another kind than a public function takes: one sentence that names the argument.

Values of the right kind that break the op's contract are in test_bad_calls.py.
"""

import re
from dataclasses import replace
from functools import partial
from math import inf, nan

import cases
import numpy as np
import pytest
import torch
from declined_blocks import OddNorm
from torch import nn

import mnv2_kernels as mk
from mnv2_kernels import FoldedWeights, inverted_residual

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(2, 8, 6, 7, generator=torch.Generator().manual_seed(0))
NOT_INTEGERS = (True, 1.0, 1.5, nan, "1", None, [1], (1, 1), torch.tensor(1), 1j)


def weights() -> FoldedWeights:
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    shapes = ((8, 24), (24,), (3, 3, 24), (24,), (24, 8), (8,))
    return FoldedWeights(*map(randn, shapes))


def bad_calls():
    """Sentence and arguments of `inverted_residual`."""
    for x in (None, 1, "x", [X], X.tolist(), X.numpy(), object()):
        yield f"x must be a tensor, got {type(x).__name__}", {"x": x}
    for other in (None, 1, {}, weights().tensors(), X, nn.Conv2d(8, 8, 1)):
        kind = type(other).__name__
        yield f"weights must be FoldedWeights, got {kind}", {"weights": other}
    for name in tensor_names():
        for other in (1, 1.0, "w", [1.0], np.zeros(24, np.float32)):
            kind = type(other).__name__
            changed = replace(weights(), **{name: other})
            yield f"{name} must be a tensor, got {kind}", {"weights": changed}
    for name in ("w_dw", "w_project"):
        changed = replace(weights(), **{name: None})
        yield f"{name} must be a tensor, got NoneType", {"weights": changed}
    for name in ("clip_expand", "clip_dw", "clip_project"):
        for clip in (None, 6, 6.0, "06", ("0", "6"), (None, 6.0), (0j, 6.0), torch.ones(2)):
            changed = replace(weights(), **{name: clip})
            known = "hardswish, silu, gelu, gelu_tanh"
            sentence = f"{name} must be two numbers or one of {known}, got {clip!r}"
            yield sentence, {"weights": changed}
    for name in ("stride", "dilation"):
        for value in NOT_INTEGERS:
            yield f"{name} must be an integer, got {value!r}", {name: value}
    for padding in (1, 1.0, "1111", torch.ones(4, dtype=torch.int64), True):
        yield f"padding must be 4 integers, got {padding!r}", {"padding": padding}
    for value in set(NOT_INTEGERS[:6]) - {None}:
        yield f"padding must be an integer, got {value!r}", {"padding": (1, 1, 1, value)}
    for value in (None, 0, 1, 0.5, "no", torch.tensor(True)):
        yield f"residual must be a bool, got {value!r}", {"residual": value}


def tensor_names():
    return ("w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")


def test_the_function(backend):
    good = {"x": X, "weights": weights(), "backend": backend}
    before = inverted_residual(**good)
    calls = list(bad_calls())
    for sentence, changes in calls:
        with pytest.raises(TypeError, match=f"^inverted_residual: {re.escape(sentence)}$"):
            inverted_residual(**(good | changes))
        assert torch.equal(inverted_residual(**good), before), sentence


def test_integers_of_numpy_are_integers(backend):
    call = partial(inverted_residual, X, weights(), backend=backend)
    one, two = np.int64(1), np.int32(2)
    given = call(stride=two, padding=np.array([1, 0, 1, 2]), dilation=one)
    assert torch.equal(given, call(stride=2, padding=(1, 0, 1, 2), dilation=1))


def bad_blocks():
    """Error, sentence and arguments of `InvertedResidual`."""
    for name in ("in_channels", "out_channels", "stride", "kernel_size"):
        for value in NOT_INTEGERS:
            yield TypeError, f"{name} must be an integer, got {value!r}", {name: value}
    for name in ("in_channels", "out_channels"):
        for value in (0, -8, -(2**63)):
            yield ValueError, f"{name} must be at least 1, got {value}", {name: value}
    for value in (0, 3, -1, 2**40):
        yield ValueError, f"stride must be in (1, 2), got {value}", {"stride": value}
    for value in (0, 1, 2, 4, 7, -3):
        yield ValueError, f"kernel_size must be in (3, 5), got {value}", {"kernel_size": value}
    for value in ("6", None, [6], 1j, torch.tensor(6)):
        yield TypeError, f"expand_ratio must be a number, got {value!r}", {"expand_ratio": value}
    for value in (0, -1, nan, inf, -0.0):
        sentence = f"expand_ratio must be above 0 and finite, got {value!r}"
        yield ValueError, sentence, {"expand_ratio": value}
    sentence = "expand_ratio must give at least one hidden channel, got 0.01 of 8"
    yield ValueError, sentence, {"expand_ratio": 0.01}
    for value in (1, "1111", 1.0):
        yield TypeError, f"padding must be 4 integers, got {value!r}", {"padding": value}
    for value in (None, 1.0, True, "1"):
        sentence = f"padding must be an integer, got {value!r}"
        yield TypeError, sentence, {"padding": (value,) * 4}
    for value in ((1, 1), (), (3, 1, 1, 1), (1, 1, 1, -1), (1,) * 5):
        sentence = "padding must be 4 integers (top, left, bottom, right) from 0 to 2, got"
        yield ValueError, f"{sentence} {value}", {"padding": value}
    sentence = "padding must keep the size of a block with a residual, 2 in both directions, got"
    yield ValueError, f"{sentence} (0, 0, 1, 1)", {"padding": (0, 0, 1, 1)}
    for value in ("gpu", "", 1, b"cpu"):
        sentence = f"backend must be one of cpu, cuda, triton, reference, got {value!r}"
        yield ValueError, sentence, {"backend": value}


BAD_NORMS = [
    (TypeError, "norm_layer must be a constructor, got None", None),
    (TypeError, "norm_layer must be a constructor, got 1", 1),
    (TypeError, "norm_layer must be a constructor, got BatchNorm2d(8", nn.BatchNorm2d(8)),
    (ValueError, "norm_layer must make batch norms of images, got Identity", nn.Identity),
    (ValueError, "norm_layer must make batch norms of images, got BatchNorm1d", nn.BatchNorm1d),
    (ValueError, "norm_layer must make batch norms of images, got BatchNorm3d", nn.BatchNorm3d),
    (ValueError, "norm_layer must make batch norms of images, got OddNorm", OddNorm),
    (
        ValueError,
        "norm_layer must make batch norms of images, got GroupNorm",
        partial(nn.GroupNorm, 2),
    ),
    (
        ValueError,
        "norm_layer must make batch norms of images, got LazyBatchNorm2d",
        lambda channels: nn.LazyBatchNorm2d(),
    ),
    (
        ValueError,
        "norm_layer must make batch norms of images, got NoneType",
        lambda channels: None,
    ),
    (
        ValueError,
        "norm_layer must make norms of 48 channels, got 49",
        lambda channels: nn.BatchNorm2d(channels + 1),
    ),
]


def test_the_block():
    good = {"in_channels": 8, "out_channels": 8}
    calls = list(bad_blocks())
    for error, sentence, changes in calls:
        arguments = good | changes
        with pytest.raises(error, match=f"^InvertedResidual: {re.escape(sentence)}$"):
            mk.InvertedResidual(
                arguments.pop("in_channels"), arguments.pop("out_channels"), **arguments
            )
    for error, sentence, norm_layer in BAD_NORMS:
        for make in (partial(mk.InvertedResidual, 8, 8), mk.mobilenet_v2):
            sentence = sentence if make is not mk.mobilenet_v2 else sentence.split(" of 48")[0]
            with pytest.raises(error, match=f"^{re.escape(sentence)}"):
                make(norm_layer=norm_layer)


def bad_networks():
    for value in ("1", None, [1.0], 1j, torch.tensor(1.0)):
        yield TypeError, f"width_mult must be a number, got {value!r}", {"width_mult": value}
    for value in (0, -1, nan, inf, -inf):
        sentence = f"width_mult must be above 0 and finite, got {value!r}"
        yield ValueError, sentence, {"width_mult": value}
    for value in NOT_INTEGERS:
        yield TypeError, f"num_classes must be an integer, got {value!r}", {"num_classes": value}
    for value in (0, -1):
        yield ValueError, f"num_classes must be at least 1, got {value}", {"num_classes": value}


def test_the_network():
    calls = list(bad_networks())
    for error, sentence, changes in calls:
        with pytest.raises(error, match=f"^mobilenet_v2: {re.escape(sentence)}$"):
            mk.mobilenet_v2(**changes)


SHAPE = "input_shape must be (C, H, W) or (N, C, H, W), got "
BAD_SHAPES = [
    *(
        (TypeError, "input_shape must be a sequence of integers, got ", shape)
        for shape in (None, 3, 3.0, "332", {3: 1, 32: 2, 33: 3}, np.array([3, 32, 32]), X)
    ),
    *(
        (ValueError, SHAPE, shape)
        for shape in (
            (3, 32),
            (3, True, 32),
            (3, "32", 32),
            (3, None, 32),
            (nan, nan, nan),
            (3, 32, torch.tensor(32)),
            (-1, 3, 32, 32),
            ("x", 3, 32, 32),
            (1.0, 3, 32, 32),
            (3, 0, 32),
            (3, 32, -(2**63)),
        )
    ),
    *(
        (ValueError, "input_shape must be below 2**31 in all sizes, got ", shape)
        for shape in ((3, 2**31, 1), (3, 2**40, 2**40), (3, 2**62, 2**62), (2**63, 3, 32, 32))
    ),
]
DENSE = "x must be a dense tensor, got "
IMAGE = torch.zeros(1, 3, 32, 32)


def bad_images():
    for x in (None, 1, IMAGE.numpy(), [IMAGE], IMAGE.to_sparse(), IMAGE.to_mkldnn()):
        yield DENSE, x
    yield DENSE, torch.nested.as_nested_tensor([IMAGE[0]])
    for x in (IMAGE.to(torch.complex64), IMAGE.bool(), IMAGE.to(torch.float8_e4m3fn)):
        yield "x must be torch.float32 on cpu, got ", x


needs_cpp = pytest.mark.skipif(
    "cpu" not in cases.kernel_backends(), reason="needs the compiled extension"
)


@needs_cpp
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_plan():
    model = mk.mobilenet_v2(0.35, 10).eval()
    plan = mk.plan(model, (3, 32, 32))
    before = plan(IMAGE)
    for error, sentence, shape in BAD_SHAPES:
        with pytest.raises(error, match=f"^plan: {re.escape(sentence)}"):
            mk.plan(model, shape)
    for dtype in ("float32", 1, torch.tensor(1), float):
        with pytest.raises(TypeError, match="^plan: dtype must be a torch.dtype, got "):
            mk.plan(model, (3, 32, 32), dtype=dtype)
    images = list(bad_images())
    for sentence, x in images:
        with pytest.raises(TypeError, match=f"^plan: {re.escape(sentence)}"):
            plan(x)
        assert torch.equal(plan(IMAGE), before), sentence
    made = mk.plan(model, [np.int64(3), np.int32(32), 32])
    assert made.input_shape == (3, 32, 32) and torch.equal(made(IMAGE), before)


@pytest.mark.parametrize(
    ("function", "argument"),
    [(mk.fuse, "model"), (mk.unfuse, "model"), (mk.explain, "model"), (mk.freeze_bn, "model")]
    + [(mk.fold, "block"), (partial(mk.plan, input_shape=(3, 32, 32)), "model")],
    ids=["fuse", "unfuse", "explain", "freeze_bn", "fold", "plan"],
)
def test_what_is_no_module(function, argument, request):
    name = request.node.callspec.id
    others = (None, 1, "model", nn.Module, {}, [nn.Linear(2, 2)], X, nn.Parameter(X), weights())
    for other in others:
        kind = type(other).__name__
        sentence = f"^{name}: {argument} must be a torch.nn.Module, got {kind}$"
        with pytest.raises(TypeError, match=sentence):
            function(other)
