"""The same tensor with other strides, offsets and neighbours in memory."""

from collections.abc import Iterator
from itertools import permutations

import torch
from cases import LAYOUTS
from torch import Tensor


def in_memory_order(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same tensor with its dimensions lying in memory in this order, outermost first."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


def inside_nan(tensor: Tensor, dims: tuple[int, ...], step: int = 1) -> Tensor:
    """The same tensor as a slice of a larger one, which is NaN everywhere else."""
    size = [n * step + 3 if d in dims else n for d, n in enumerate(tensor.shape)]
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    larger = in_memory_order(torch.full(size, torch.nan, dtype=tensor.dtype), tuple(order))
    window = tuple(
        slice(2, 2 + n * step, step) if d in dims else slice(None)
        for d, n in enumerate(tensor.shape)
    )
    larger[window] = tensor
    return larger[window]


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """The same tensor, strides included, that many elements into a storage of NaN."""
    storage = torch.full((offset + tensor.numel(),), torch.nan, dtype=tensor.dtype)
    view = storage.as_strided(tensor.shape, tensor.stride(), offset)
    return view.copy_(tensor)


def layouts_of(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """x in every layout; where a layout cannot hold arbitrary values, with others."""
    for order in permutations(range(4)):
        yield f"memory order {order}", in_memory_order(x, order)
    for name, memory_format in LAYOUTS.items():
        dense = x.contiguous(memory_format=memory_format)
        for dims in ((0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)):
            yield f"{name} sliced in {dims}", inside_nan(dense, dims)
            yield f"{name} every second of {dims}", inside_nan(dense, dims, step=2)
        for offset in range(1, 8):
            yield f"{name} at offset {offset}", at_offset(dense, offset)
        for dims in ((0,), (1,), (2,), (3,), (1, 2, 3), (0, 1, 2, 3)):
            one = dense[tuple(slice(1) if d in dims else slice(None) for d in range(4))]
            yield f"{name} expanded in {dims}", one.expand(x.shape)
    yield "flipped", x.flip(1, 2, 3)
    yield "lazily negated", torch._neg_view(x)
    flat = x.flatten()
    yield "overlapping windows", flat.as_strided(x.shape, (2, 1, 1, 1))
    yield "overlapping rows", flat.as_strided(x.shape, (5, 1, x.shape[1], x.shape[1] - 1))
    with torch.inference_mode():
        yield "inference tensor", x.clone()
