"""Bad calls of the op: the error, the sentence it begins with, and the arguments."""

from math import inf, nan

import torch

from mnv2_kernels import FoldedWeights, inverted_residual

NAMES = ("x", "w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")


BIASES = ("b_expand", "b_dw", "b_project")


CLIPS = ("clip_expand", "clip_dw", "clip_project")


def good_call() -> dict:
    """The op's arguments: 8 channels in and out, 24 hidden."""
    randn = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 6, 7), (8, 24), (24,), (3, 3, 24), (24,), (24, 8), (8,))
    tensors = (torch.randn(shape, generator=randn) for shape in shapes)
    return {
        **dict(zip(NAMES, tensors, strict=True)),
        "stride": 1,
        "padding": (1, 1, 1, 1),
        "dilation": 1,
        "residual": False,
        **dict.fromkeys(CLIPS, (0.0, 6.0)),
    }


def bad_shapes():
    for shape in ((), (8,), (8, 6), (8, 6, 7), (1, 2, 8, 6, 7)):
        yield f"x must have shape (N, C_in, H, W), got {shape}", {"x": shape}
    for shape in ((), (8,), (24, 8), (8, 24, 1), (24, 8, 1, 1), (8, 23), (9, 24)):
        yield f"w_expand must have shape (C_in=8, C_hidden=24), got {shape}", {"w_expand": shape}
    yield "w_expand must have shape (C_in=9, C_hidden=24), got (8, 24)", {"x": (2, 9, 6, 7)}
    yield "w_expand must have shape (C_in=8, C_hidden=25), got (8, 24)", {"w_dw": (3, 3, 25)}
    wrong_kernels = ((9, 24), (24, 1, 3, 3), (24, 3, 3), (3, 5, 24), (5, 3, 24), (3, 3, 24, 1))
    for shape in (*wrong_kernels, (1, 1, 24), (2, 2, 24), (4, 4, 24), (9, 9, 24), (0, 0, 24), ()):
        sentence = f"w_dw must have shape (k, k, C_hidden) with k 3 or 5, got {shape}"
        yield sentence, {"w_dw": shape}
    for shape in ((), (24,), (8, 24), (24, 8, 1), (8, 24, 1, 1), (25, 8), (0, 8)):
        yield f"w_project must have shape (C_hidden=24, C_out), got {shape}", {"w_project": shape}
    for name, letter, channels in zip(
        BIASES, ("hidden", "hidden", "out"), (24, 24, 8), strict=True
    ):
        for shape in ((), (channels + 1,), (0,), (1,), (channels, 1), (1, channels)):
            yield f"{name} must have shape (C_{letter}={channels},), got {shape}", {name: shape}
    yield "b_expand must be None where w_expand is None", {"w_expand": None}
    yield (
        "w_dw must have shape (3, 3, C_in=8) where w_expand is None, got (3, 3, 24)",
        {"w_expand": None, "b_expand": None},
    )
    for channels in ((0, 24, 8), (8, 0, 8), (8, 24, 0)):
        c_in, hidden, c_out = channels
        yield (
            f"every channel count must be at least 1, got C_in={c_in}, C_hidden={hidden}, C_out",
            {"x": (2, c_in, 6, 7), "w_expand": (c_in, hidden), "b_expand": (hidden,)}
            | {"w_dw": (3, 3, hidden), "b_dw": (hidden,)}
            | {"w_project": (hidden, c_out), "b_project": (c_out,)},
        )


def bad_settings():
    for stride in (0, 3, -1, 4, 2**40, -(2**63)):
        yield f"stride must be 1 or 2, got {stride}", {"stride": stride}
    for dilation in (0, -1, -(2**63)):
        yield f"dilation must be 1 or 2, got {dilation}", {"dilation": dilation}
    for i in range(4):
        for value in (-1, 3, 2**62):
            padding = [value if i == j else 1 for j in range(4)]
            sentence = "padding must be 4 integers (top, left, bottom, right) from 0 to 2"
            yield f"{sentence}, got {padding}", {"padding": padding}
    yield (
        "padding must be 4 integers (top, left, bottom, right) from 0 to 4, got [5, 0, 0, 0]",
        {"padding": (5, 0, 0, 0), "dilation": 2},
    )
    for padding in ([], [1], [1, 1], [1, 1, 1], [1] * 5):
        yield "padding must be 4 integers (top, left, bottom, right)", {"padding": padding}
    for height, width in ((0, 7), (6, 0), (0, 0), (2, 7), (6, 2), (1, 1)):
        yield (
            "x must be large enough for one output row and column,"
            f" got {height}x{width} with padding [0, 0, 0, 0]",
            {"x": (2, 8, height, width), "padding": (0, 0, 0, 0)},
        )
    yield "x must be large enough", {"x": (2, 8, 2, 2), "dilation": 2}
    for name in CLIPS:
        for clip in ((6.0, 0.0), (nan, 6.0), (0.0, nan), (nan, nan), (inf, -inf), (), (0.0,) * 3):
            yield f"{name} must be (lower, upper) with lower <= upper, got [", {name: clip}
    residual = {"residual": True}
    yield "residual needs x and the result to have one shape", residual | {"stride": 2}
    yield (
        "residual needs x and the result to have one shape, got (2, 8, 6, 7) and (2, 8, 4, 7)",
        residual | {"padding": (0, 1, 0, 1)},
    )
    yield (
        "residual needs x and the result to have one shape, got (2, 8, 6, 7) and (2, 9, 6, 7)",
        residual | {"w_project": (24, 9), "b_project": None},
    )
    yield "residual needs x", residual | {"padding": (2, 2, 2, 2)}


def bad_dtypes():
    call = good_call()
    for name in NAMES:
        for dtype in (torch.int32, torch.int8, torch.bool, torch.complex64):
            sentence = f"{name} must be a dense floating-point tensor, got "
            yield sentence, {name: call[name].to(dtype)}
    for name in NAMES[1:]:
        for dtype in (torch.float64, torch.bfloat16):
            yield f"{name} must have the dtype of x, ", {name: call[name].to(dtype)}
    yield "w_expand must have the dtype of x, ", {"x": call["x"].half()}
    yield "w_dw must have the dtype of x, ", {"x": call["x"].double(), "w_expand": None}


def fill(changes: dict) -> dict:
    return {
        name: torch.zeros(value) if name in NAMES and isinstance(value, tuple) else value
        for name, value in changes.items()
    }


BAD_CALLS = [
    *((ValueError, *call) for call in bad_shapes()),
    *((ValueError, *call) for call in bad_settings()),
    *((TypeError, *call) for call in bad_dtypes()),
]


def call_reference(call: dict) -> torch.Tensor:
    call = dict(call)
    x = call.pop("x")
    fields = (*NAMES[1:], *CLIPS)
    weights = FoldedWeights(**{name: call.pop(name) for name in fields})
    return inverted_residual(x, weights, backend="reference", **call)
