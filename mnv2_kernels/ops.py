"""THE op, `torch.ops.mnv2.inverted_residual`: schema, contract, fake kernel, gradients, FLOPs.

Kernels register themselves for their device under this one schema (csrc/ops_cpu.cpp for CPU);
everything that PyTorch needs to know beyond the kernel is here, once for all of them. The Triton
kernel has a twin of the op, `inverted_residual_triton`, into which torch.compile can look.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import reference, triton_kernels
from .backends import choose, load
from .block import Clip, Padding, output_size, same_padding
from .fold import FoldedWeights

_TENSORS = (
    "Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_dw, Tensor? b_dw,"
    " Tensor w_project, Tensor? b_project"
)
_SETTINGS = (
    "int stride, int[4] padding, int dilation, bool residual,"
    " float[2] clip_expand, float[2] clip_dw, float[2] clip_project"
)
_TENSOR_NAMES = ("x", "w_expand", "b_expand", "w_dw", "b_dw", "w_project", "b_project")

_library = torch.library.Library("mnv2", "DEF")
_library.define(
    f"inverted_residual({_TENSORS}, {_SETTINGS}) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
_library.define(
    f"inverted_residual_backward(Tensor grad_y, {_TENSORS}, {_SETTINGS}, bool[7] needs_grad)"
    " -> Tensor[]",
    tags=[torch.Tag.pt2_compliant_tag],
)
# What the Triton op runs on CPU tensors; tracing stops there.
_library.define(
    f"inverted_residual_interpreted({_TENSORS}, {_SETTINGS}) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
_library.impl(
    "inverted_residual_interpreted", lambda *args: triton_kernels.inverted_residual(*args), "CPU"
)
load(_library)
_op = torch.ops.mnv2.inverted_residual.default


@torch.library.triton_op("mnv2::inverted_residual_triton", mutates_args=())
def _triton_op(
    x: Tensor,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    w_dw: Tensor,
    b_dw: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    residual: bool,
    clip_expand: Sequence[float],
    clip_dw: Sequence[float],
    clip_project: Sequence[float],
) -> Tensor:
    settings = (stride, padding, dilation, residual, clip_expand, clip_dw, clip_project)
    arguments = (x, w_expand, b_expand, w_dw, b_dw, w_project, b_project, *settings)
    _check_once(*arguments)
    if x.is_cuda:
        return triton_kernels.inverted_residual(*arguments)
    return torch.ops.mnv2.inverted_residual_interpreted(*arguments)


_library.impl("inverted_residual", lambda *args: _triton_op(*args), "CUDA")
_ops = {"cpu": _op, "triton": torch.ops.mnv2.inverted_residual_triton.default}


def inverted_residual(
    x: Tensor,
    weights: FoldedWeights,
    *,
    stride: int = 1,
    padding: Padding | None = None,
    dilation: int = 1,
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The inverted residual block in one pass; the expanded tensor is never allocated.

    Args:
        x: (N, C_in, H, W), any strides; channels_last is read in place, others are copied once.
        weights: from `fold`; their clips are applied after each stage.
        stride: of the depthwise, 1 or 2.
        padding: zeros around the clipped expansion, (top, left, bottom, right), each smaller
            than the kernel's extent; None keeps the size at stride 1.
        dilation: of the depthwise, 1 or 2.
        residual: add x to the result; needs x and the result to have the same shape.
        backend: a name from `backends()`; None takes the first that can run.

    Returns:
        (N, C_out, H_out, W_out), dense channels_last, dtype of x. Never aliases x.

    Raises:
        ValueError, TypeError: an argument breaks the contract; the sentence names it.
        RuntimeError: `backend` cannot run this call; the sentence says why.

    Source: MobileNetV2 (arXiv 1801.04381), sections 3.3 and 5.1. Differentiable in x and all
    weights; the backward pass recomputes through `reference.inverted_residual`.
    """
    if padding is None:
        padding = same_padding(weights.w_dw.shape[0], dilation)
    arguments = op_arguments(weights, stride, padding, dilation, residual)
    return run(choose(backend, x), x, arguments)


def op_arguments(
    weights: FoldedWeights, stride: int, padding: Padding, dilation: int, residual: bool
) -> tuple:
    """All arguments of the op but x."""
    return (*weights.tensors(), stride, padding, dilation, residual, *weights.clips())


def run(backend: str, x: Tensor, arguments: tuple) -> Tensor:
    """The op on a backend that `choose` has named."""
    if backend == "reference":
        return _reference(x, *arguments)
    op = _ops[backend]
    if torch.compiler.is_compiling():
        return op(x, *arguments)
    # The op has no forward-mode derivative; the reference has.
    if forward_ad._current_level >= 0:
        return _reference(x, *arguments)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *arguments):
        return op(x, *arguments)
    # The dispatcher would find out in Python that there is nothing to differentiate, which takes a
    # tenth of a small block's time.
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, *arguments)


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

    csrc/host.cpp makes the same checks in the same sentences, before a kernel gets pointers.
    """
    tensors = (x, w_expand, b_expand, w_dw, b_dw, w_project, b_project)
    _check_dtypes(tensors)
    _value(x.dim() == 4, lambda: f"x must have shape (N, C_in, H, W), got {_shape(x)}")
    batch, in_channels, height, width = x.shape
    _value(
        w_dw.dim() == 3 and w_dw.shape[0] == w_dw.shape[1] and w_dw.shape[0] in (3, 5),
        lambda: f"w_dw must have shape (k, k, C_hidden) with k 3 or 5, got {_shape(w_dw)}",
    )
    kernel, _, hidden = w_dw.shape
    if w_expand is None:
        _value(b_expand is None, lambda: "b_expand must be None where w_expand is None")
        _value(
            hidden == in_channels,
            lambda: (
                f"w_dw must have shape ({kernel}, {kernel}, C_in={in_channels}) where"
                f" w_expand is None, got {_shape(w_dw)}"
            ),
        )
    else:
        _value(
            w_expand.shape == (in_channels, hidden),
            lambda: (
                f"w_expand must have shape (C_in={in_channels}, C_hidden={hidden}),"
                f" got {_shape(w_expand)}"
            ),
        )
    _value(
        w_project.dim() == 2 and w_project.shape[0] == hidden,
        lambda: f"w_project must have shape (C_hidden={hidden}, C_out), got {_shape(w_project)}",
    )
    out_channels = w_project.shape[1]
    _value(
        in_channels > 0 and hidden > 0 and out_channels > 0,
        lambda: (
            f"every channel count must be at least 1, got C_in={in_channels},"
            f" C_hidden={hidden}, C_out={out_channels}"
        ),
    )
    biases = (
        ("b_expand", b_expand, "C_hidden", hidden),
        ("b_dw", b_dw, "C_hidden", hidden),
        ("b_project", b_project, "C_out", out_channels),
    )
    for name, bias, letter, channels in biases:
        _value(
            bias is None or bias.shape == (channels,),
            lambda n=name, b=bias, a=letter, c=channels: (
                f"{n} must have shape ({a}={c},), got {_shape(b)}"
            ),
        )
    _value(stride in (1, 2), lambda: f"stride must be 1 or 2, got {stride}")
    _value(dilation in (1, 2), lambda: f"dilation must be 1 or 2, got {dilation}")
    extent = dilation * (kernel - 1)
    _value(
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
        height >= 1 and width >= 1 and height_out >= 1 and width_out >= 1,
        lambda: (
            f"x must be large enough for one output row and column, got {height}x{width}"
            f" with padding {list(padding)}"
        ),
    )
    clips = (("clip_expand", clip_expand), ("clip_dw", clip_dw), ("clip_project", clip_project))
    for name, clip in clips:
        _value(
            len(clip) == 2 and clip[0] <= clip[1],
            lambda n=name, c=clip: f"{n} must be (lower, upper) with lower <= upper, got {list(c)}",
        )
    shape = (batch, out_channels, height_out, width_out)
    _value(
        not residual or shape == x.shape,
        lambda: (
            f"residual needs x and the result to have one shape, got {_shape(x)} and {tuple(shape)}"
        ),
    )
    return shape


_passed: set[tuple] = set()


def _check_once(*arguments) -> None:
    """`check`, for arguments of one kind the first time only: it takes longer than a launch."""
    tensors, settings = arguments[:7], arguments[7:]
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


def _check_dtypes(tensors: tuple[Tensor | None, ...]) -> None:
    x = tensors[0]
    for name, tensor in zip(_TENSOR_NAMES, tensors, strict=True):
        if tensor is None:
            continue
        torch._check_type(
            tensor.is_floating_point() and tensor.layout == torch.strided,
            lambda n=name, t=tensor: (
                f"inverted_residual: {n} must be a dense floating-point"
                f" tensor, got {t.dtype} {t.layout}"
            ),
        )
        allowed = {x.dtype, torch.float32} if name.startswith("b_") else {x.dtype}
        torch._check_type(
            tensor.dtype in allowed,
            lambda n=name, t=tensor: (
                f"inverted_residual: {n} must have the dtype of x, {x.dtype}, got {t.dtype}"
            ),
        )
        _value(
            tensor.device == x.device,
            lambda n=name, t=tensor: f"{n} must be on the device of x, {x.device}, got {t.device}",
        )


def _value(condition: bool, sentence) -> None:
    torch._check_value(condition, lambda: f"inverted_residual: {sentence()}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _reference(*args) -> Tensor:
    check(*args)
    x, *weights, stride, padding, dilation, residual = args[:11]
    return reference.inverted_residual(
        x,
        FoldedWeights(*weights, *args[11:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        residual=residual,
    )


@_triton_op.register_fake
@torch.library.register_fake("mnv2::inverted_residual_interpreted", lib=_library)
@torch.library.register_fake("mnv2::inverted_residual", lib=_library)
def _fake(x, *args):
    shape = check(x, *args)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@torch.library.register_fake("mnv2::inverted_residual_backward", lib=_library)
def _backward_fake(grad_y, *args):
    tensors, needs_grad = args[:7], args[14]
    wanted = (t for t, needed in zip(tensors, needs_grad, strict=True) if needed)
    return [t.new_empty(t.shape) for t in wanted]


def _backward_kernel(grad_y, *args):
    """Gradients of the tensors marked in needs_grad: recomputes the block, then differentiates."""
    tensors, settings, needs_grad = args[:7], args[7:14], args[14]
    with torch.enable_grad(), _autograd_dispatch():
        leaves = [
            t if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip(tensors, needs_grad, strict=True)
        ]
        # As the forward pass did: autocast would compute in less.
        with torch.autocast(grad_y.device.type, enabled=False):
            y = _reference(*leaves, *settings)
    wanted = [t for t, needed in zip(leaves, needs_grad, strict=True) if needed]
    return [g.contiguous() for g in torch.autograd.grad(y, wanted, grad_y)]


@contextmanager
def _autograd_dispatch():
    """Record a graph inside a kernel, where the dispatcher has left autograd behind."""
    keys = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]


def _backward(ctx, grad_y):
    needs_grad = ctx.needs_input_grad[:7]
    grads = iter(
        torch.ops.mnv2.inverted_residual_backward(
            grad_y, *ctx.saved_tensors, *ctx.settings, needs_grad
        )
    )
    return *(next(grads) if needed else None for needed in needs_grad), *(None,) * 7


def _double_backward(ctx, *grads):
    raise NotImplementedError(
        "inverted_residual: second derivatives are not implemented;"
        " backend='reference' is differentiable any number of times"
    )


def _no_vmap(info, in_dims, *args):
    raise NotImplementedError(
        "inverted_residual: vmap is not supported, the op takes batches itself: x (N, C_in, H, W)"
    )


_library.impl("inverted_residual_backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_autograd("mnv2::inverted_residual_backward", _double_backward, lib=_library)
for _name in ("mnv2::inverted_residual", "mnv2::inverted_residual_triton"):
    torch.library.register_autograd(_name, _backward, setup_context=_setup_context, lib=_library)
    torch.library.register_vmap(_name, _no_vmap, lib=_library)
    # The CPU kernel computes in float32, so autocast brings everything back to it there.
    torch.library.register_autocast(_name, "cpu", torch.float32, lib=_library)
    torch.library.register_autocast(_name, "cuda", torch.float16, lib=_library)


@register_flop_formula([torch.ops.mnv2.inverted_residual, torch.ops.mnv2.inverted_residual_triton])
def _flops(x_shape, w_expand_shape, b_expand, w_dw_shape, *args, out_shape, **kwargs) -> int:
    """Two per multiply-add, as torch's own formulas; halo recomputation is not counted."""
    batch, in_channels, height, width = x_shape
    kernel, _, hidden = w_dw_shape
    out_pixels = batch * math.prod(out_shape[2:])
    expansion = 0 if w_expand_shape is None else batch * height * width * in_channels * hidden
    depthwise = out_pixels * kernel * kernel * hidden
    return 2 * (expansion + depthwise + out_pixels * hidden * out_shape[1])
