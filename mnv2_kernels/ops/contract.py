"""The op's contract: which arguments it takes, and the sentence for every other."""

from collections.abc import Callable
from itertools import chain
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor, nn

from ..block.config import CURVES, MAX_EXTENT, SCALES, Clip, Padding, output_size
from ..block.fold import FoldedGate, FoldedWeights

# The tensors of both ops; those of `inverted_residual` are the first seven.
TENSOR_NAMES = (
    *("x", "w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project"),
    *("w_squeeze", "b_squeeze", "w_excite", "b_excite"),
)
_NO_GATE = (None,) * 4
_CLIP_NAMES = ("clip_expand", "clip_dw", "clip_project")
_NEEDED = ("w_dw", "w_project", "w_squeeze", "w_excite")
_TENSORS = frozenset((Tensor, nn.Parameter, type(None)))
_NUMBERS = frozenset((int, float))
_INTEGER = frozenset((int,))


def whole(owner: str, name: str, value: object, least: int | None = None) -> int:
    """The argument `name` of `owner` as an int.

    Raises:
        TypeError: it is no integer; bools and tensors are none.
        ValueError: it is below `least`.
    """
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool | Tensor) or not isinstance(value, SupportsIndex):
            raise TypeError(f"{owner}: {name} must be an integer, got {value!r}")
        value = index(value)
    if least is not None and value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")
    return value


def check_kinds(
    x: Tensor,
    weights: FoldedWeights,
    stride: int,
    padding: Padding | None,
    dilation: int,
    residual: bool,
) -> tuple[int, Padding | None, int]:
    """Stride, padding and dilation of a call as the ints that the op takes.

    Raises:
        TypeError: an argument is of another kind than the op's schema says; which would be a
            sentence of PyTorch's dispatcher, or none where no dispatcher comes to see it.
    """
    if _is_usual(weights, stride, padding, dilation, residual) and isinstance(x, Tensor):
        return stride, padding, dilation
    if not isinstance(x, Tensor):
        raise TypeError(f"inverted_residual: x must be a tensor, got {_kind(x)}")
    if not isinstance(weights, FoldedWeights):
        raise TypeError(f"inverted_residual: weights must be FoldedWeights, got {_kind(weights)}")
    gate = weights.gate
    if gate is not None and not isinstance(gate, FoldedGate):
        raise TypeError(f"inverted_residual: gate must be a FoldedGate, got {_kind(gate)}")
    tensors = (*weights.tensors(), *(() if gate is None else gate.tensors()))
    for name, tensor in zip(TENSOR_NAMES[1:], tensors, strict=False):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in _NEEDED):
            raise TypeError(f"inverted_residual: {name} must be a tensor, got {_kind(tensor)}")
    for name, activation in zip(_CLIP_NAMES, weights.clips(), strict=True):
        _check_activation(name, activation)
    if gate is not None:
        _check_activation("squeeze", gate.squeeze)
        if not isinstance(gate.scale, str) or gate.scale not in SCALES:
            known = ", ".join(SCALES)
            raise TypeError(f"inverted_residual: scale must be one of {known}, got {gate.scale!r}")
    if not isinstance(residual, bool):
        raise TypeError(f"inverted_residual: residual must be a bool, got {residual!r}")
    if padding is not None:
        if isinstance(padding, str | Tensor) or not hasattr(padding, "__iter__"):
            raise TypeError(f"inverted_residual: padding must be 4 integers, got {padding!r}")
        padding = tuple(whole("inverted_residual", "padding", p) for p in padding)
    stride = whole("inverted_residual", "stride", stride)
    return stride, padding, whole("inverted_residual", "dilation", dilation)


def _is_usual(weights: object, stride: object, padding: object, dilation: object, residual) -> bool:
    """Fast path: whether all arguments already have their exact types."""
    if type(weights) is not FoldedWeights or weights.w_dw is None or weights.w_project is None:
        return False
    if weights.gate is not None:
        return False
    clips = weights.clips()
    return (
        type(stride) is type(dilation) is int
        and type(residual) is bool
        and (padding is None or type(padding) is tuple and _INTEGER.issuperset(map(type, padding)))
        and _TENSORS.issuperset(map(type, weights.tensors()))
        and all(type(clip) is tuple for clip in clips)
        and _NUMBERS.issuperset(map(type, chain.from_iterable(clips)))
    )


def _check_activation(name: str, activation: object) -> None:
    """A name is that of a curve; what is no name is two numbers, of which `check` says more."""
    if isinstance(activation, str):
        known = activation in CURVES
    else:
        known = isinstance(activation, tuple | list)
        known = known and all(isinstance(bound, int | float) for bound in activation)
    if not known:
        raise TypeError(
            f"inverted_residual: {name} must be two numbers or one of {', '.join(CURVES)},"
            f" got {activation!r}"
        )
    if not isinstance(activation, str):
        _check_clip("inverted_residual", name, activation)


def check(
    x: Tensor,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    w_dw: Tensor,
    b_dw: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    stride: int,
    padding: Padding,
    dilation: int,
    residual: bool,
    clip_expand: Clip,
    clip_dw: Clip,
    clip_project: Clip,
) -> tuple[int, int, int, int]:
    """The op's contract. Returns the shape of the result; raises with a sentence otherwise.

    csrc/torch/host.cpp makes the same checks in the same sentences, before a kernel gets pointers.
    """
    owner = "inverted_residual"
    tensors = (x, w_expand, b_expand, w_dw, b_dw, w_project, b_project, *_NO_GATE)
    shape = _check_block(owner, tensors, stride, padding, dilation, residual)
    for name, clip in zip(_CLIP_NAMES, (clip_expand, clip_dw, clip_project), strict=True):
        _check_clip(owner, name, clip)
    return shape


def check_mbconv(*arguments) -> tuple[int, int, int, int]:
    """The same of the op `mbconv`: x, then what `MBConvArguments` names."""
    owner, most = "mbconv", len(CURVES)
    curves, bounds, scale = arguments[15:]
    shape = _check_block(owner, arguments[:11], *arguments[11:15])
    _value(
        owner,
        len(curves) == 4 and all(0 <= curve <= most for curve in curves),
        lambda: f"curves must be 4 integers from 0 to {most}, got {list(curves)}",
    )
    pairs = zip(bounds[::2], bounds[1::2], strict=False)
    _value(
        owner,
        len(bounds) == 8 and all(lower <= upper for lower, upper in pairs),
        lambda: f"bounds must be 4 times lower, upper with lower <= upper, got {list(bounds)}",
    )
    _value(owner, scale in (0, 1), lambda: f"scale must be 0 or 1, got {scale}")
    return shape


def _check_clip(owner: str, name: str, clip: Clip) -> None:
    # Not `torch._check_value`, which the compiler cannot trace in `check_kinds`.
    if len(clip) != 2 or not clip[0] <= clip[1]:
        raise ValueError(
            f"{owner}: {name} must be (lower, upper) with lower <= upper, got {list(clip)}"
        )


def _check_block(
    owner: str,
    tensors: tuple[Tensor | None, ...],
    stride: int,
    padding: Padding,
    dilation: int,
    residual: bool,
) -> tuple[int, int, int, int]:
    """What the ops have in common: eleven tensors and the geometry."""
    _check_dtypes(owner, tensors)
    x, w_expand, b_expand, w_dw, b_dw, w_project, b_project = tensors[:7]
    _value(owner, x.dim() == 4, lambda: f"x must have shape (N, C_in, H, W), got {_shape(x)}")
    batch, in_channels, height, width = x.shape
    is_mbconv = owner == "mbconv"
    dense = is_mbconv and w_dw.dim() == 4
    is_square = (w_dw.dim() == 3 or dense) and w_dw.shape[0] == w_dw.shape[1]
    kernels = (1, 3, 5) if dense else (3, 5, 7) if is_mbconv else (3, 5)
    known = "3, 5 or 7, or (k, k, C_in, C_hidden) with k 1, 3 or 5" if is_mbconv else "3 or 5"
    _value(
        owner,
        is_square and w_dw.shape[0] in kernels,
        lambda: f"w_dw must have shape (k, k, C_hidden) with k {known}, got {_shape(w_dw)}",
    )
    kernel, hidden = w_dw.shape[0], w_dw.shape[-1]
    if dense:
        _check_dense(owner, tensors, dilation)
    elif w_expand is None:
        _value(owner, b_expand is None, lambda: "b_expand must be None where w_expand is None")
        _value(
            owner,
            hidden == in_channels,
            lambda: (
                f"w_dw must have shape ({kernel}, {kernel}, C_in={in_channels}) where"
                f" w_expand is None, got {_shape(w_dw)}"
            ),
        )
    else:
        _value(
            owner,
            w_expand.shape == (in_channels, hidden),
            lambda: (
                f"w_expand must have shape (C_in={in_channels}, C_hidden={hidden}),"
                f" got {_shape(w_expand)}"
            ),
        )
    _value(
        owner,
        w_project.dim() == 2 and w_project.shape[0] == hidden,
        lambda: f"w_project must have shape (C_hidden={hidden}, C_out), got {_shape(w_project)}",
    )
    out_channels = w_project.shape[1]
    _value(
        owner,
        in_channels > 0 and hidden > 0 and out_channels > 0,
        lambda: (
            f"every channel count must be at least 1, got C_in={in_channels},"
            f" C_hidden={hidden}, C_out={out_channels}"
        ),
    )
    _check_bias(owner, "b_expand", b_expand, "C_hidden", hidden)
    _check_bias(owner, "b_dw", b_dw, "C_hidden", hidden)
    _check_bias(owner, "b_project", b_project, "C_out", out_channels)
    _check_gate(owner, tensors[7:], hidden)
    _value(owner, stride in (1, 2), lambda: f"stride must be 1 or 2, got {stride}")
    if is_mbconv and not dense:
        most = MAX_EXTENT // (kernel - 1)
        _value(
            owner,
            1 <= dilation <= most,
            lambda: f"dilation must be from 1 to {most} where k is {kernel}, got {dilation}",
        )
    else:
        _value(owner, dilation in (1, 2), lambda: f"dilation must be 1 or 2, got {dilation}")
    extent = dilation * (kernel - 1)
    _value(
        owner,
        len(padding) == 4 and all(0 <= p <= extent for p in padding),
        lambda: (
            f"padding must be 4 integers (top, left, bottom, right) from 0 to {extent},"
            f" got {list(padding)}"
        ),
    )
    top, left, bottom, right = padding
    height_out = output_size(height, kernel, stride, top, bottom, dilation)
    width_out = output_size(width, kernel, stride, left, right, dilation)
    _value(
        owner,
        height >= 1 and width >= 1 and height_out >= 1 and width_out >= 1,
        lambda: (
            f"x must be large enough for one output row and column, got {height}x{width}"
            f" with padding {list(padding)}"
        ),
    )
    shape = (batch, out_channels, height_out, width_out)
    _value(
        owner,
        not residual or shape == x.shape,
        lambda: (
            f"residual needs x and the result to have one shape, got {_shape(x)} and {tuple(shape)}"
        ),
    )
    return shape


def _check_dense(owner: str, tensors: tuple[Tensor | None, ...], dilation: int) -> None:
    """What holds besides where w_dw has four dimensions."""
    x, w_expand, b_expand, w_dw = tensors[:4]
    where = "where w_dw has four dimensions"
    _value(
        owner,
        w_expand is None and b_expand is None,
        lambda: f"w_expand and b_expand must be None {where}",
    )
    _value(
        owner,
        w_dw.shape[2] == x.shape[1],
        lambda: (
            f"w_dw must have shape ({w_dw.shape[0]}, {w_dw.shape[1]}, C_in={x.shape[1]}, C_hidden),"
            f" got {_shape(w_dw)}"
        ),
    )
    _value(owner, tensors[7] is None, lambda: f"w_squeeze must be None {where}")
    _value(owner, dilation == 1, lambda: f"dilation must be 1 {where}, got {dilation}")


def _check_gate(owner: str, tensors: tuple[Tensor | None, ...], hidden: int) -> None:
    w_squeeze, b_squeeze, w_excite, b_excite = tensors
    if w_squeeze is None:
        for name, tensor in zip(TENSOR_NAMES[8:], tensors[1:], strict=True):
            _value(
                owner, tensor is None, lambda n=name: f"{n} must be None where w_squeeze is None"
            )
        return
    _value(
        owner,
        w_squeeze.dim() == 2 and w_squeeze.shape[0] == hidden and w_squeeze.shape[1] > 0,
        lambda: (
            f"w_squeeze must have shape (C_hidden={hidden}, R) with R at least 1,"
            f" got {_shape(w_squeeze)}"
        ),
    )
    squeezed = w_squeeze.shape[1]
    _value(
        owner,
        w_excite is not None and w_excite.shape == (squeezed, hidden),
        lambda: (
            f"w_excite must have shape (R={squeezed}, C_hidden={hidden}),"
            f" got {None if w_excite is None else _shape(w_excite)}"
        ),
    )
    _check_bias(owner, "b_squeeze", b_squeeze, "R", squeezed)
    _check_bias(owner, "b_excite", b_excite, "C_hidden", hidden)


def _check_bias(owner: str, name: str, bias: Tensor | None, letter: str, channels: int) -> None:
    _value(
        owner,
        bias is None or bias.shape == (channels,),
        lambda: f"{name} must have shape ({letter}={channels},), got {_shape(bias)}",
    )


# Arguments of both ops, which differ in number.
_passed: set[tuple] = set()


def check_once(check: Callable[..., object], count: int, *arguments) -> None:
    """`check` of an op that takes `count` tensors, for arguments of one kind the first time only:
    it takes longer than a launch.
    """
    tensors, settings = arguments[:count], arguments[count:]
    kinds = [t if t is None else (t.shape, t.dtype, t.device, t.layout) for t in tensors]
    values = [tuple(v) if isinstance(v, list) else v for v in settings]
    try:
        known = (key := (*kinds, *values)) in _passed
    except TypeError:  # Sizes that are symbols have no hash.
        check(*arguments)
        return
    if not known:
        check(*arguments)
        if len(_passed) == 4096:
            _passed.clear()
        _passed.add(key)


def _check_dtypes(owner: str, tensors: tuple[Tensor | None, ...]) -> None:
    x = tensors[0]
    for name, tensor in zip(TENSOR_NAMES, tensors, strict=True):
        if tensor is None:
            continue
        torch._check_type(
            tensor.is_floating_point() and tensor.layout == torch.strided,
            lambda n=name, t=tensor: (
                f"{owner}: {n} must be a dense floating-point tensor, got {t.dtype} {t.layout}"
            ),
        )
        allowed = {x.dtype, torch.float32} if name.startswith("b_") else {x.dtype}
        torch._check_type(
            tensor.dtype in allowed,
            lambda n=name, t=tensor: (
                f"{owner}: {n} must have the dtype of x, {x.dtype}, got {t.dtype}"
            ),
        )
        _value(
            owner,
            tensor.device == x.device,
            lambda n=name, t=tensor: f"{n} must be on the device of x, {x.device}, got {t.device}",
        )


def _value(owner: str, condition: bool, sentence) -> None:
    torch._check_value(condition, lambda: f"{owner}: {sentence()}")


def _kind(value: object) -> str:
    return type(value).__name__


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
