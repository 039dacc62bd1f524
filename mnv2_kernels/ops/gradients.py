"""Gradients of the block; the expanded tensor is recomputed a piece at a time and never whole.

Hidden channels do not meet between expansion and projection, so a chunk of them can go forward and
back again alone: its part of the gradient of x is one term of a sum, its weights' are its own.
On the CPU the float32 kernel does it, in bands of rows (csrc/cpu/backward.inc); on other devices,
and in float64, the reference under autograd, on a chunk of some images at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..block.config import NO_CLIP
from . import reference
from .contract import TENSOR_NAMES, check, check_mbconv
from .extension import missing

# Values of the expansion of a piece.
_PIECE = 1 << 20
_LEAST_CHANNELS = 16

Tensors = Sequence[Tensor | None]


def gradients(grad_y: Tensor, *args) -> list[Tensor]:
    """Of the tensors marked in needs_grad, in their order, shapes and dtypes.

    `args` are the op's arguments, then needs_grad: seven bools. grad_y (N, C_out, H_out, W_out)
    may have any strides. Sums are float32 at least. Where a value is at a bound of its clip no
    gradient passes, as in hardtanh.
    """
    tensors, settings, needs_grad = args[:7], args[7:14], args[14]
    stride, padding, dilation, residual, clip_expand, clip_dw, clip_project = settings
    geometry, clips = (stride, padding, dilation), (clip_expand, clip_dw)
    x = tensors[0]
    wanted = [t for t, needed in zip(tensors, needs_grad, strict=True) if needed]
    _check_call("inverted_residual", grad_y, tensors, needs_grad, check(*args[:14]))
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad = grad_y.to(dtype)
    compiled = missing is None and x.device.type == "cpu" and dtype == torch.float32
    if compiled:
        tensors = [t if t is None else t.to(dtype) for t in tensors]
    # Autocast would compute in less than the forward pass did.
    with torch.autocast(x.device.type, enabled=False):
        if tuple(clip_project) != NO_CLIP:
            if compiled:
                y = torch.ops.mnv2.inverted_residual(
                    *tensors, *geometry, False, *clips, clip_project
                )
            else:
                y = _projection(tensors, geometry, clips)
            grad = torch.ops.aten.hardtanh_backward(grad, y, *clip_project)
        if not any(needs_grad[:6]):
            found = []
        elif compiled:
            found = torch.ops.mnv2.inverted_residual_backward_cpu(
                grad, *tensors[:6], *geometry, *clips, needs_grad[:6]
            )
        else:
            found = _by_pieces(
                grad,
                tensors[:6],
                _pieces(tensors),
                lambda leaves: _run(leaves, geometry, clips),
                needs_grad[:6],
            )
    if residual and needs_grad[0]:
        found[0] += grad_y
    if needs_grad[6]:
        found.append(grad.sum((0, 2, 3)))
    return [g.to(t.dtype) for g, t in zip(found, wanted, strict=True)]


def mbconv_gradients(grad_y: Tensor, *args) -> list[Tensor]:
    """The same for the op `mbconv`: `args` are its arguments, then needs_grad: eleven bools.

    The gate joins all hidden channels and pixels of an image, so that a piece is some images.
    """
    tensors, settings, needs_grad = args[:11], args[11:18], args[18]
    _check_call("mbconv", grad_y, tensors, needs_grad, check_mbconv(*args[:18]))
    if not any(needs_grad):
        return []
    x = tensors[0]
    grad = grad_y.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        found = _by_pieces(
            grad,
            tensors,
            _images(tensors),
            lambda leaves: reference.mbconv_op(*leaves, *settings),
            needs_grad,
        )
    wanted = [t for t, needed in zip(tensors, needs_grad, strict=True) if needed]
    return [g.to(t.dtype) for g, t in zip(found, wanted, strict=True)]


def _check_call(
    owner: str, grad_y: Tensor, tensors: Tensors, needs_grad: Sequence[bool], shape: tuple
) -> None:
    x = tensors[0]
    for name, tensor, needed in zip(TENSOR_NAMES, tensors, needs_grad, strict=False):
        torch._check_value(
            tensor is not None or not needed,
            lambda n=name: f"{owner}: needs_grad must be False for {n}, which is None",
        )
    torch._check_type(
        grad_y.is_floating_point() and grad_y.layout == torch.strided,
        lambda: (
            f"{owner}: grad_y must be a dense floating-point tensor, got"
            f" {grad_y.dtype} {grad_y.layout}"
        ),
    )
    torch._check_value(
        grad_y.device == x.device,
        lambda: f"{owner}: grad_y must be on the device of x, {x.device}, got {grad_y.device}",
    )
    torch._check_value(
        grad_y.shape == shape,
        lambda: f"{owner}: grad_y must have shape {shape}, got {tuple(grad_y.shape)}",
    )


def _projection(tensors: Tensors, geometry: tuple, clips: tuple) -> Tensor:
    """What the projection gives, unclipped; float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    results = []
    for _, pieces in _pieces(tensors):
        y = sum(_run(_cut(tensors[:6], piece, dtype), geometry, clips) for piece in pieces)
        results.append(y if tensors[6] is None else y + tensors[6].to(dtype)[:, None, None])
    return torch.cat(results)


def _by_pieces(
    grad: Tensor,
    tensors: Tensors,
    parts: Iterable[tuple[slice, list[tuple]]],
    run: Callable[[Tensors], Tensor],
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """Sums of the gradients of `run` on the parts, each some images and their pieces."""
    needed = [i for i, needs in enumerate(needs_grad) if needs]
    sums = [grad.new_zeros(tensors[i].shape) for i in needed]
    if needs_grad[0]:
        sums[0] = sums[0].to(memory_format=torch.channels_last)
    for images, pieces in parts:
        for piece in pieces:
            leaves = _cut(tensors, piece, grad.dtype)
            wanted = [leaves[i].requires_grad_() for i in needed]
            with torch.enable_grad(), _autograd_dispatch():
                y = run(leaves)
            terms = torch.autograd.grad(y, wanted, grad[images])
            for i, whole, term in zip(needed, sums, terms, strict=True):
                whole[piece[i]] += term
    return sums


def _pieces(tensors: Tensors) -> Iterator[tuple[slice, list[tuple]]]:
    """Some images, and for every chunk of hidden channels its place in x and five weights."""
    x, w_expand, _, w_dw, *_ = tensors
    pixels, hidden = x.shape[2] * x.shape[3], w_dw.shape[2]
    count = max(1, min(len(x), _PIECE // (pixels * _LEAST_CHANNELS)))
    channels = max(_LEAST_CHANNELS, _PIECE // (pixels * count))
    every = slice(None)
    # An empty batch is one piece.
    for image in range(0, max(len(x), 1), count):
        images = slice(image, image + count)
        chunks = [slice(c, c + channels) for c in range(0, hidden, channels)]
        yield (
            images,
            [
                (
                    (images, c) if w_expand is None else (images,),
                    (every, c),
                    (c,),
                    (every, every, c),
                    (c,),
                    (c,),
                )
                for c in chunks
            ],
        )


def _images(tensors: Tensors) -> Iterator[tuple[slice, list[tuple]]]:
    """Some images with all weights."""
    x, w_dw = tensors[0], tensors[3]
    count = max(1, _PIECE // (x.shape[2] * x.shape[3] * w_dw.shape[-1]))
    for image in range(0, max(len(x), 1), count):
        images = slice(image, image + count)
        yield images, [((images,), *((...,),) * (len(tensors) - 1))]


def _cut(tensors: Tensors, piece: tuple, dtype: torch.dtype) -> list[Tensor | None]:
    return [
        None if t is None else t.detach()[place].to(dtype)
        for t, place in zip(tensors, piece, strict=True)
    ]


def _run(piece: Tensors, geometry: tuple, clips: tuple) -> Tensor:
    return reference.inverted_residual_op(*piece, None, *geometry, False, *clips, NO_CLIP)


@contextmanager
def _autograd_dispatch():
    """Record a graph inside a kernel, below the dispatcher's autograd."""
    keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield
