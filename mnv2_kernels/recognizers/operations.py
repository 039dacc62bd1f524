"""The operations of PyTorch that a trace understands, each as the node that it records.

Every function here and in `activations`, `arithmetic` and `shapes` takes the arguments of the
PyTorch function that it records.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..block.config import output_size
from . import activations, arithmetic, shapes
from .declined import Declined
from .trace import OPERATIONS, Convolution, Linear, Node, Norm, Pad, Recorded, Trace, pair

_HALVES = (torch.bfloat16, torch.float16)


def _convolution(
    trace: Trace, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Recorded:
    if not isinstance(x, Recorded) or len(x.sizes) != 4:
        raise trace.declined("a convolution is not given an image (N, C, H, W)")
    conv = _owner(trace, ("weight", weight), ("bias", bias))
    if conv is None:
        raise trace.declined("a convolution uses the weight and the bias of different modules")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise trace.declined(f"a convolution of {weight.dtype} is given {x.dtype}")
    if x.sizes[1] != weight.shape[1] * groups:
        raise ChannelsDiffer(trace, x, weight.shape[1] * groups)
    kernel = tuple(weight.shape[2:])
    stride, dilation = pair(stride), pair(dilation)
    if padding == "same":
        rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        # An odd zero goes to the bottom and to the right.
        sides = (rows // 2, columns // 2, rows - rows // 2, columns - columns // 2)
    else:
        vertical, horizontal = (0, 0) if padding == "valid" else pair(padding)
        sides = (vertical, horizontal, vertical, horizontal)
    node = Convolution(
        "convolution", (x.node,), trace.call, conv, kernel, stride, sides, dilation, groups
    )
    height, width = (
        max(0, output_size(x.sizes[2 + i], kernel[i], stride[i], *sides[i::2], dilation[i]))
        for i in (0, 1)
    )
    return trace.new(node, (x.sizes[0], weight.shape[0], height, width))


class ChannelsDiffer(Declined):
    """A convolution of another number of channels than the value that it is given."""

    def __init__(self, trace: Trace, x: Recorded, expected: int):
        super().__init__(f"a convolution of {expected} channels is given {x.sizes[1]}")
        self.expected = expected


def _batch_norm(
    trace: Trace,
    x,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *_,
) -> Recorded:
    if (training and not trace.live_norms) or running_mean is None:
        mode = "is in training mode" if running_mean is not None else "has no running statistics"
        raise trace.declined(f"batch norm {mode} and uses the statistics of the batch")
    norm = _owner(
        trace,
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    )
    if norm is None:
        raise trace.declined("a batch norm uses tensors of different modules")
    if running_mean.shape != x.sizes[1:2]:
        raise trace.declined(
            f"a batch norm of {running_mean.numel()} channels is given {x.sizes[1]}"
        )
    # Norms of half-precision images may be more exact than these.
    if running_mean.dtype != x.dtype and (
        x.dtype not in _HALVES or running_mean.dtype != torch.float32
    ):
        raise trace.declined(f"a batch norm of {running_mean.dtype} is given {x.dtype}")
    if getattr(norm, "eps", None) != eps:
        raise trace.declined(f"a batch norm uses an eps of {eps}, which is not that of its module")
    if training != (isinstance(norm, _BatchNorm) and norm.training):
        raise trace.declined("a batch norm is not in the mode that its module says")
    if training and norm.momentum not in (momentum, None):
        raise trace.declined(f"a batch norm has a momentum of {momentum}, unlike its module")
    return trace.new(Norm("norm", (x.node,), trace.call, norm), x.sizes)


def _owner(trace: Trace, *named: tuple[str, Tensor | None]) -> nn.Module | None:
    """The module that has all these tensors under these names, and None where they are None."""
    for module in trace.owners(named[0][1], named[0][0]):
        if all(getattr(module, name, None) is tensor for name, tensor in named):
            return module
    return None


def _pad(trace, x, pad, mode="constant", value=None) -> Recorded:
    if mode != "constant" or value not in (None, 0):
        raise trace.declined(f"its padding is {mode} and not of zeros")
    if len(pad) not in (2, 4) or min(pad) < 0 or len(x.sizes) != 4:
        raise trace.declined(f"it pads by {tuple(pad)}, expected rows and columns of zeros")
    left, right, top, bottom = (*pad, 0, 0)[:4]
    batch, channels, height, width = x.sizes
    node = Pad("pad", (x.node,), trace.call, (top, left, bottom, right))
    return trace.new(node, (batch, channels, height + top + bottom, width + left + right))


def _dropout(trace, x, p=0.5, training=True, inplace=False) -> Recorded:
    if training and p != 0:
        raise trace.declined("dropout is in training mode and drops values")
    return x


def _copy_if_strided(trace, x, *args, **kwargs) -> Recorded:
    """A copy or the tensor itself, by its strides."""
    same = trace.new(Node("same", (x.node,), trace.call), x.sizes)
    same.is_shared = x.is_shared = True
    return same


def _clone(trace, x, *, memory_format=None) -> Recorded:
    return trace.new(Node("same", (x.node,), trace.call), x.sizes)


def _linear(trace, x, weight, bias=None) -> Recorded:
    linear = _owner(trace, ("weight", weight), ("bias", bias))
    if linear is None or len(x.sizes) != 2:
        raise trace.declined("a fully connected layer is not one of vectors with its own weight")
    if x.sizes[1] != weight.shape[1]:
        raise ChannelsDiffer(trace, x, weight.shape[1])
    return trace.new(Linear("linear", (x.node,), trace.call, linear), (x.sizes[0], len(weight)))


def _dimensions(trace, x) -> int:
    return len(x.sizes)


def _size(trace, x, dim=None):
    trace.is_sized = True
    return x.sizes if dim is None else x.sizes[dim]


def _is_float(trace, x) -> bool:
    return x.dtype.is_floating_point


_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
    *(F.feature_alpha_dropout, torch.dropout),
)
OPERATIONS |= {
    torch.conv2d: _convolution,
    F.conv2d: _convolution,
    F.batch_norm: _batch_norm,
    F.pad: _pad,
    F.linear: _linear,
    **dict.fromkeys(_DROPOUTS, _dropout),
    Tensor.contiguous: _copy_if_strided,
    torch.clone: _clone,
    Tensor.clone: _clone,
    Tensor.dim: _dimensions,
    Tensor.ndimension: _dimensions,
    Tensor.size: _size,
    Tensor.is_floating_point: _is_float,
    torch.is_floating_point: _is_float,
    **activations.TABLE,
    **arithmetic.TABLE,
    **shapes.TABLE,
}
