"""Means over all pixels, and other shapes of what is left: one number for each channel."""

from types import EllipsisType, NoneType

import torch
from torch import Tensor
from torch.nn import functional as F

from .trace import Average, Node, Recorded, Trace, Unfinished, pair


def _average(trace: Trace, x: Recorded, keeps_dims: bool) -> Recorded:
    batch, channels = x.sizes[:2]
    shape = (batch, channels, 1, 1) if keeps_dims else (batch, channels)
    return trace.new(Average("average", (x.node,), trace.call), shape)


def _adaptive_average(trace, x, output_size) -> Recorded:
    sizes = tuple(output_size) if isinstance(output_size, tuple | list) else (output_size,) * 2
    if sizes != (1, 1) or len(x.sizes) != 4:
        raise trace.declined(f"its average pool has a result of {sizes}, expected one pixel")
    return _average(trace, x, True)


def _average_pool(trace, x, kernel_size, stride=None, padding=0, *args, **kwargs) -> Recorded:
    trace.is_sized = True
    whole = len(x.sizes) == 4 and pair(kernel_size) == tuple(x.sizes[2:])
    if not whole or pair(padding) != (0, 0) or args or kwargs:
        raise trace.declined("its average pool is not over all pixels")
    return _average(trace, x, True)


def _mean(trace, x, dim=None, keepdim=False, *, dtype=None, keepdims=False) -> Recorded:
    dims = {d % len(x.sizes) for d in dim} if isinstance(dim, tuple | list) else set()
    if len(x.sizes) != 4 or dims != {2, 3} or dtype is not None:
        raise trace.declined("its mean is not over all pixels")
    return _average(trace, x, bool(keepdim or keepdims))


def _seen_as(trace: Trace, x: Recorded, shape: tuple[int, ...]) -> Recorded:
    """The same numbers in the same memory."""
    made = trace.new(Node("same", (x.node,), trace.call), shape)
    made.is_shared = x.is_shared = True
    return made


def _flatten(trace, x, start_dim=0, end_dim=-1) -> Recorded:
    if len(x.sizes) == 2 and (start_dim, end_dim) in ((1, -1), (1, 1)):
        return x
    if len(x.sizes) != 4 or start_dim != 1 or end_dim not in (-1, 3):
        raise trace.declined("it flattens something else than all dimensions behind the batch")
    return _reshape(trace, x, x.sizes[0], -1)


def _reshape(trace, x, *shape) -> Recorded:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    batch, channels = x.sizes[:2]
    # Of the first two sizes, one may be left open; ones may follow.
    known = sizes[:2] in ((batch, channels), (batch, -1), (-1, channels))
    ones = (1,) * (len(sizes) - 2)
    if x.sizes.numel() != batch * channels or not known or sizes[2:] != ones:
        raise trace.declined(f"it reshapes {tuple(x.sizes)} to {tuple(sizes)}")
    return _seen_as(trace, x, (batch, channels, *ones))


def _squeeze(trace, x, dim=None) -> Recorded:
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    removed = {d % len(x.sizes) for d in dims if d is not None}
    if not removed or min(removed) < 2 or any(x.sizes[d] != 1 for d in removed):
        raise trace.declined("it removes dimensions other than one row and one column")
    return _seen_as(trace, x, [n for d, n in enumerate(x.sizes) if d not in removed])


def _unsqueeze(trace, x, dim) -> Recorded:
    at = dim % (len(x.sizes) + 1)
    if at < 2 or x.sizes[2:].numel() != 1:
        raise trace.declined("it adds a dimension to something else than one number per channel")
    return _seen_as(trace, x, (*x.sizes, 1))


_KEYS = (slice, int, NoneType, EllipsisType)


def _item(trace, x, key) -> Recorded:
    """[:, :, None, None] and [:, :, 0, 0], with dots in place of colons or not."""
    parts = key if isinstance(key, tuple) and all(isinstance(k, _KEYS) for k in key) else ()
    every = slice(None)
    if len(x.sizes) == 2 and parts in ((every, every, None, None), (..., None, None)):
        return _seen_as(trace, x, (*x.sizes, 1, 1))
    one_pixel = len(x.sizes) == 4 and x.sizes[2:] == (1, 1)
    if one_pixel and parts in ((every, every, 0, 0), (..., 0, 0)):
        return _seen_as(trace, x, x.sizes[:2])
    raise trace.declined("it takes a part of a tensor")


def _expand_as(trace, x, other) -> Recorded:
    if not isinstance(x, Recorded) or not isinstance(other, Recorded):
        raise trace.declined("it expands a tensor that it does not compute")
    if x.sizes == other.sizes:
        return _seen_as(trace, x, x.sizes)
    if x.sizes != (*other.sizes[:2], 1, 1):
        raise trace.declined(f"it expands {tuple(x.sizes)} to {tuple(other.sizes)}")
    reason = trace.declined("it expands something else than a gate to the size of an image")
    made = trace.new(Unfinished("expanded", (x.node,), trace.call, reason), other.sizes)
    made.is_shared = x.is_shared = True
    return made


TABLE = {
    F.adaptive_avg_pool2d: _adaptive_average,
    F.avg_pool2d: _average_pool,
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((torch.flatten, Tensor.flatten), _flatten),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    **dict.fromkeys((torch.squeeze, Tensor.squeeze), _squeeze),
    **dict.fromkeys((torch.unsqueeze, Tensor.unsqueeze), _unsqueeze),
    Tensor.__getitem__: _item,
    Tensor.expand_as: _expand_as,
}
