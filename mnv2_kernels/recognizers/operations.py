"""The operations of PyTorch that a trace understands, each as the node that it records.

Every function below takes the arguments of the PyTorch function that it records.
"""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..block.config import output_size
from .declined import Declined
from .trace import OPERATIONS, Clamp, Convolution, Linear, Node, Norm, Pad, Recorded, Trace

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
    stride, dilation = _pair(stride), _pair(dilation)
    if padding == "same":
        rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        # An odd zero goes to the bottom and to the right.
        sides = (rows // 2, columns // 2, rows - rows // 2, columns - columns // 2)
    else:
        vertical, horizontal = (0, 0) if padding == "valid" else _pair(padding)
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
    if training or running_mean is None:
        mode = "is in training mode" if running_mean is not None else "has no running statistics"
        raise trace.declined(f"batch norm {mode} and needs the statistics of whole tensors")
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
    return trace.new(Norm("norm", (x.node,), trace.call, norm), x.sizes)


def _owner(trace: Trace, *named: tuple[str, Tensor | None]) -> nn.Module | None:
    """The module that has all these tensors under these names, and None where they are None."""
    for module in trace.owners(named[0][1], named[0][0]):
        if all(getattr(module, name, None) is tensor for name, tensor in named):
            return module
    return None


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return values * 2 if len(values) == 1 else values


def _clamp(trace: Trace, x: Recorded, lower, upper, in_place: bool) -> Recorded:
    if not isinstance(x, Recorded):
        raise trace.declined("a bound of a clip is computed")
    bounds = (-inf if lower is None else lower, inf if upper is None else upper)
    if not all(isinstance(bound, int | float) for bound in bounds):
        raise trace.declined("a bound of a clip is a tensor")
    if not bounds[0] <= bounds[1]:
        raise trace.declined(f"a clip has bounds in the wrong order, {bounds}")
    node = Clamp("clip", (x.node,), trace.call, (float(bounds[0]), float(bounds[1])))
    return trace.replace(x, node) if in_place else trace.new(node, x.sizes)


def _clip(trace, x, min=None, max=None) -> Recorded:
    return _clamp(trace, x, min, max, False)


def _clip_in_place(trace, x, min=None, max=None) -> Recorded:
    return _clamp(trace, x, min, max, True)


def _relu(trace, x, inplace=False) -> Recorded:
    return _clamp(trace, x, 0, None, inplace)


def _relu6(trace, x, inplace=False) -> Recorded:
    return _clamp(trace, x, 0, 6, inplace)


def _hardtanh(trace, x, min_val=-1.0, max_val=1.0, inplace=False) -> Recorded:
    return _clamp(trace, x, min_val, max_val, inplace)


def _pad(trace, x, pad, mode="constant", value=None) -> Recorded:
    if mode != "constant" or value not in (None, 0):
        raise trace.declined(f"its padding is {mode} and not of zeros")
    if len(pad) not in (2, 4) or min(pad) < 0 or len(x.sizes) != 4:
        raise trace.declined(f"it pads by {tuple(pad)}, expected rows and columns of zeros")
    left, right, top, bottom = (*pad, 0, 0)[:4]
    batch, channels, height, width = x.sizes
    node = Pad("pad", (x.node,), trace.call, (top, left, bottom, right))
    return trace.new(node, (batch, channels, height + top + bottom, width + left + right))


def _add(trace, x, other, *, alpha=1, out=None) -> Recorded:
    return trace.new(_sum(trace, x, other, alpha, out), x.sizes)


def _add_in_place(trace, x, other, *, alpha=1) -> Recorded:
    return trace.replace(x, _sum(trace, x, other, alpha, None))


def _sum(trace, x, other, alpha, out) -> Node:
    both = isinstance(x, Recorded) and isinstance(other, Recorded)
    if not both or alpha != 1 or out is not None or x.sizes != other.sizes:
        raise trace.declined("it adds something else than two results of one shape")
    return Node("add", (x.node, other.node), trace.call)


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


def _average(trace: Trace, x: Recorded, keeps_dims: bool) -> Recorded:
    batch, channels = x.sizes[:2]
    shape = (batch, channels, 1, 1) if keeps_dims else (batch, channels)
    return trace.new(Node("average", (x.node,), trace.call), shape)


def _adaptive_average(trace, x, output_size) -> Recorded:
    sizes = tuple(output_size) if isinstance(output_size, tuple | list) else (output_size,) * 2
    if sizes != (1, 1) or len(x.sizes) != 4:
        raise trace.declined(f"its average pool has a result of {sizes}, expected one pixel")
    return _average(trace, x, True)


def _average_pool(trace, x, kernel_size, stride=None, padding=0, *args, **kwargs) -> Recorded:
    trace.is_sized = True
    whole = len(x.sizes) == 4 and _pair(kernel_size) == tuple(x.sizes[2:])
    if not whole or _pair(padding) != (0, 0) or args or kwargs:
        raise trace.declined("its average pool is not over all pixels")
    return _average(trace, x, True)


def _mean(trace, x, dim=None, keepdim=False, *, dtype=None, keepdims=False) -> Recorded:
    dims = {d % len(x.sizes) for d in dim} if isinstance(dim, tuple | list) else set()
    if len(x.sizes) != 4 or dims != {2, 3} or dtype is not None:
        raise trace.declined("its mean is not over all pixels")
    return _average(trace, x, bool(keepdim or keepdims))


def _flatten(trace, x, start_dim=0, end_dim=-1) -> Recorded:
    if len(x.sizes) == 2 and (start_dim, end_dim) in ((1, -1), (1, 1)):
        return x
    if len(x.sizes) != 4 or start_dim != 1 or end_dim not in (-1, 3):
        raise trace.declined("it flattens something else than all dimensions behind the batch")
    return _reshape(trace, x, x.sizes[0], -1)


def _reshape(trace, x, *shape) -> Recorded:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    batch, channels = x.sizes[:2]
    if x.sizes[2:] not in ((1, 1), ()) or sizes not in ((batch, -1), (batch, channels)):
        raise trace.declined(f"it reshapes {tuple(x.sizes)} to {tuple(sizes)}")
    made = trace.new(Node("same", (x.node,), trace.call), (batch, channels))
    made.is_shared = x.is_shared = True
    return made


def _squeeze(trace, x, dim=None) -> Recorded:
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if len(x.sizes) != 4 or x.sizes[2:] != (1, 1) or {*dims} not in ({2, 3}, {-1, -2}):
        raise trace.declined("it removes dimensions other than one row and one column")
    return _reshape(trace, x, x.sizes[0], -1)


def _linear(trace, x, weight, bias=None) -> Recorded:
    linear = _owner(trace, ("weight", weight), ("bias", bias))
    if linear is None or len(x.sizes) != 2:
        raise trace.declined("a fully connected layer is not one of vectors with its own weight")
    if x.sizes[1] != weight.shape[1]:
        raise ChannelsDiffer(trace, x, weight.shape[1])
    return trace.new(Linear("linear", (x.node,), trace.call, linear), (x.sizes[0], len(weight)))


def _scaled(trace, x, other) -> Recorded:
    """The first half of a frozen batch norm: x * (weight / sqrt(running_var + eps))."""
    x, scale = (x, other) if isinstance(x, Recorded) else (other, x)
    norm = trace.running()
    if not (isinstance(scale, Tensor) and not isinstance(scale, Recorded) and _is_frozen(norm)):
        raise trace.declined("it multiplies by something")
    if not torch.equal(scale.flatten(), norm.weight * (norm.running_var + norm.eps).rsqrt()):
        raise trace.declined("it multiplies by something else than a frozen batch norm does")
    return trace.new(Norm("scaled", (x.node,), trace.call, norm), x.sizes)


def _shifted(trace, x, shift) -> Recorded:
    """The second half: + (bias - running_mean * scale)."""
    norm = x.node.norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    if not torch.equal(shift.flatten(), norm.bias - norm.running_mean * scale):
        raise trace.declined("it adds something else than a frozen batch norm does")
    return trace.new(Norm("norm", x.node.inputs, trace.call, norm), x.sizes)


def _is_frozen(module: nn.Module | None) -> bool:
    tensors = ("weight", "bias", "running_mean", "running_var")
    return isinstance(getattr(module, "eps", None), float) and all(
        isinstance(module._buffers.get(name), Tensor) for name in tensors
    )


def _plus(trace, x, other, **settings) -> Recorded:
    first = x.node if isinstance(x, Recorded) else None
    if first is not None and first.kind == "scaled" and not isinstance(other, Recorded):
        return _shifted(trace, x, other)
    return _add(trace, x, other, **settings)


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
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.relu_: lambda trace, x: _relu(trace, x, True),
    torch.relu_: lambda trace, x: _relu(trace, x, True),
    Tensor.relu_: lambda trace, x: _relu(trace, x, True),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: lambda trace, x, low=-1.0, high=1.0: _hardtanh(trace, x, low, high, True),
    torch.clamp: _clip,
    torch.clip: _clip,
    Tensor.clamp: _clip,
    Tensor.clip: _clip,
    Tensor.clamp_: _clip_in_place,
    Tensor.clip_: _clip_in_place,
    torch.clamp_min: lambda trace, x, min: _clip(trace, x, min),
    Tensor.clamp_min: lambda trace, x, min: _clip(trace, x, min),
    torch.clamp_max: lambda trace, x, max: _clip(trace, x, None, max),
    Tensor.clamp_max: lambda trace, x, max: _clip(trace, x, None, max),
    F.pad: _pad,
    torch.add: _plus,
    Tensor.add: _plus,
    Tensor.__add__: _plus,
    Tensor.__radd__: _plus,
    Tensor.add_: _add_in_place,
    Tensor.__iadd__: _add_in_place,
    torch.mul: _scaled,
    Tensor.mul: _scaled,
    Tensor.__mul__: _scaled,
    Tensor.__rmul__: _scaled,
    **dict.fromkeys(_DROPOUTS, _dropout),
    Tensor.contiguous: _copy_if_strided,
    torch.clone: _clone,
    Tensor.clone: _clone,
    F.adaptive_avg_pool2d: _adaptive_average,
    F.avg_pool2d: _average_pool,
    torch.mean: _mean,
    Tensor.mean: _mean,
    torch.flatten: _flatten,
    Tensor.flatten: _flatten,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    torch.squeeze: _squeeze,
    Tensor.squeeze: _squeeze,
    F.linear: _linear,
    Tensor.dim: _dimensions,
    Tensor.ndimension: _dimensions,
    Tensor.size: _size,
    Tensor.is_floating_point: _is_float,
    torch.is_floating_point: _is_float,
}
