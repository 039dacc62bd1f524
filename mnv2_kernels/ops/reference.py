"""The block in plain PyTorch: the truth of every test and the fallback on every device.

The expanded tensor is materialised here; any floating dtype, any device, differentiable.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block.config import CURVES, NO_CLIP, SCALES, Activation, Padding
from ..block.fold import FoldedGate, FoldedWeights


def inverted_residual(
    x: Tensor,
    weights: FoldedWeights,
    *,
    stride: int,
    padding: Padding,
    dilation: int,
    residual: bool,
) -> Tensor:
    """y = clip(project(gate * clip(depthwise(pad(clip(expand(x))))))) (+ x), paper section 3.3.

    x (N, C_in, H, W) in any layout -> y (N, C_out, H_out, W_out) channels_last, dtype of x.
    Zero padding belongs to the clipped expansion, not to x. The gate is that of `FoldedGate`, one
    where there is none. A dense block has a convolution of all channels in the depthwise's place.
    """
    h = x
    if weights.w_expand is not None:
        h = _conv1x1(h, weights.w_expand, weights.b_expand)
        h = activate(h, weights.clip_expand)
    top, left, bottom, right = padding
    h = F.pad(h, (left, right, top, bottom))
    if weights.is_dense:
        w_dw, groups = weights.w_dw.permute(3, 2, 0, 1), 1
    else:
        w_dw, groups = weights.w_dw.permute(2, 0, 1)[:, None], weights.w_dw.shape[2]
    h = F.conv2d(h, w_dw, _bias(weights.b_dw, h), stride, 0, dilation, groups)
    h = activate(h, weights.clip_dw)
    if weights.gate is not None:
        h = h * _gate(h, weights.gate)
    y = _conv1x1(h, weights.w_project, weights.b_project)
    y = activate(y, weights.clip_project)
    if residual:
        y = y + x
    return y.contiguous(memory_format=torch.channels_last)


def inverted_residual_op(x: Tensor, *arguments) -> Tensor:
    """The same of the arguments of the op `inverted_residual`."""
    weights = FoldedWeights(*arguments[:6], *map(tuple, arguments[10:]))
    return _with_settings(x, weights, arguments[6:10])


def mbconv_op(x: Tensor, *arguments) -> Tensor:
    """The same of the arguments of the op `mbconv`."""
    curves, bounds, scale = arguments[14:]
    *clips, squeeze = activations(curves, bounds)
    gate = None
    if arguments[6] is not None:
        gate = FoldedGate(*arguments[6:10], squeeze, SCALES[scale])
    return _with_settings(x, FoldedWeights(*arguments[:6], *clips, gate), arguments[10:14])


def _with_settings(x: Tensor, weights: FoldedWeights, settings: Sequence) -> Tensor:
    stride, padding, dilation, residual = settings
    return inverted_residual(
        x, weights, stride=stride, padding=padding, dilation=dilation, residual=residual
    )


def activations(curves: Sequence[int], bounds: Sequence[float]) -> list[Activation]:
    """What the op `mbconv` has after expansion, depthwise, projection and squeeze."""
    pairs = zip(bounds[::2], bounds[1::2], strict=True)
    return [CURVES[c - 1] if c else pair for c, pair in zip(curves, pairs, strict=True)]


def _conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight.t()[:, :, None, None], _bias(bias, x))


def _bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _gate(h: Tensor, gate: FoldedGate) -> Tensor:
    """(N, C_hidden, 1, 1) of h (N, C_hidden, H_out, W_out)."""
    z = _conv1x1(h.mean((2, 3), keepdim=True), gate.w_squeeze, gate.b_squeeze)
    z = _conv1x1(activate(z, gate.squeeze), gate.w_excite, gate.b_excite)
    return torch.sigmoid(z) if gate.scale == "sigmoid" else F.hardsigmoid(z)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """A clip or a curve, as PyTorch's layers compute it."""
    match activation:
        case "hardswish":
            return F.hardswish(x)
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
    # hardtanh, not clamp: its gradient is 0 at the clip points, as in ReLU and ReLU6.
    return x if activation == NO_CLIP else F.hardtanh(x, *activation)
