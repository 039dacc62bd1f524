"""THE op, `torch.ops.mnv2.inverted_residual`: schema, contract, fake kernel, gradients, FLOPs.

Kernels register themselves for their device under this one schema (csrc/torch/ops_cpu.cpp for CPU,
csrc/torch/ops_cuda.cpp for CUDA; where the latter is not built, the Triton kernel does); everything
that PyTorch needs to know beyond the kernel is here, once for all of them. The Triton kernel has a
twin of the op, `inverted_residual_triton`, into which torch.compile can look.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ..block.config import BlockConfig, Clip, Padding, same_padding
from ..block.fold import FoldedWeights
from . import gradients, reference, triton
from .backends import Block, choose, count, load
from .contract import check, check_kinds, check_once

_TENSORS = (
    "Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_dw, Tensor? b_dw,"
    " Tensor w_project, Tensor? b_project"
)
SETTINGS = (
    "int stride, int[4] padding, int dilation, bool residual,"
    " float[2] clip_expand, float[2] clip_dw, float[2] clip_project"
)

_library = torch.library.Library("mnv2", "DEF")
_library.define(
    f"inverted_residual({_TENSORS}, {SETTINGS}) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
_library.define(
    f"inverted_residual_backward(Tensor grad_y, {_TENSORS}, {SETTINGS}, bool[7] needs_grad)"
    " -> Tensor[]",
    tags=[torch.Tag.pt2_compliant_tag],
)
# The part of it that is compiled, for float32 on the CPU: up to w_project, of the gradient before
# clip_project; the residual's part of x is left out.
_library.define(
    "inverted_residual_backward_cpu(Tensor grad_y, Tensor x, Tensor? w_expand, Tensor? b_expand,"
    " Tensor w_dw, Tensor? b_dw, Tensor w_project, int stride, int[4] padding, int dilation,"
    " float[2] clip_expand, float[2] clip_dw, bool[6] needs_grad) -> Tensor[]"
)
# What the Triton op runs on CPU tensors; tracing stops there.
_library.define(
    f"inverted_residual_interpreted({_TENSORS}, {SETTINGS}) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
_library.impl("inverted_residual_interpreted", lambda *args: triton.inverted_residual(*args), "CPU")
_op = torch.ops.mnv2.inverted_residual.default

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)
_BIASES = (2, 4, 6)


def inverted_residual_triton(
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
    """What the Triton op does: a launch on CUDA tensors, the interpreter on others."""
    settings = (stride, padding, dilation, residual, clip_expand, clip_dw, clip_project)
    arguments = (x, w_expand, b_expand, w_dw, b_dw, w_project, b_project, *settings)
    check_once(*arguments)
    if x.is_cuda:
        return triton.inverted_residual(*arguments)
    return torch.ops.mnv2.inverted_residual_interpreted(*arguments)


_triton_op = torch.library.custom_op("mnv2::inverted_residual_triton", mutates_args=())(
    inverted_residual_triton
)
load(_library, _triton_op)


@_triton_op.register_torch_dispatch(FunctionalTensorMode)
def _look_inside(mode, op, types, args, kwargs):
    """The launch in place of the op, for a compiler that traces it.

    As in `torch.library.triton_op`, which imports Triton and the compiler when it registers an op.
    """
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    if custom_triton_ops_decomposition_disabled():
        return mode.__torch_dispatch__(op, types, args, kwargs)
    if not all(issubclass(t, FakeTensor) or t in (Tensor, FunctionalTensor) for t in types):
        return NotImplemented
    with mode:
        return inverted_residual_triton(*args, **kwargs)


_ops = {"cpu": _op, "cuda": _op, "triton": torch.ops.mnv2.inverted_residual_triton.default}


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

    Example:
        >>> weights = mk.fold(mk.InvertedResidual(16, 24, stride=2))
        >>> mk.inverted_residual(torch.randn(1, 16, 28, 28), weights, stride=2).shape
        torch.Size([1, 24, 14, 14])

    Args:
        x: (N, C_in, H, W), any strides; channels_last is read in place, others are copied once.
            float32, bfloat16 or float16 on a kernel, any floating dtype on the reference.
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
    weights; the backward pass recomputes the expansion piece by piece (`gradients.gradients`).
    """
    stride, padding, dilation = check_kinds(x, weights, stride, padding, dilation, residual)
    if padding is None:
        padding = same_padding(weights.w_dw.shape[0] if weights.w_dw.dim() else 0, dilation)
    settings = (stride, padding, dilation, residual)
    arguments = OpArguments(*weights.tensors(), *settings, *weights.clips())
    block = _block(arguments) if x.is_cuda else None
    return run(choose(backend, x, block), x, arguments)


class OpArguments(NamedTuple):
    """All arguments of the op but x."""

    w_expand: Tensor | None
    b_expand: Tensor | None
    w_dw: Tensor
    b_dw: Tensor | None
    w_project: Tensor
    b_project: Tensor | None
    stride: int
    padding: Padding
    dilation: int
    residual: bool
    clip_expand: Clip
    clip_dw: Clip
    clip_project: Clip


def op_arguments(weights: FoldedWeights, config: BlockConfig) -> OpArguments:
    """The arguments for a block of these sizes."""
    sizes = (config.stride, config.padding, config.dilation, config.residual)
    return OpArguments(*weights.tensors(), *sizes, *weights.clips())


def _block(arguments: OpArguments) -> Block | None:
    """What a choice looks at of the op's arguments; None where these break the contract."""
    w_expand, w_dw, w_project = arguments.w_expand, arguments.w_dw, arguments.w_project
    clips = (arguments.clip_expand, arguments.clip_dw, arguments.clip_project)
    if w_dw.dim() != 3 or w_project.dim() != 2 or (w_expand is not None and w_expand.dim() != 2):
        return None
    kernel, _, hidden = w_dw.shape
    block = Block(
        in_channels=hidden if w_expand is None else w_expand.shape[0],
        hidden_channels=hidden,
        out_channels=w_project.shape[1],
        expansion=w_expand is not None,
        kernel_size=kernel,
        stride=arguments.stride,
        dilation=arguments.dilation,
        padding=tuple(arguments.padding),
        residual=arguments.residual,
        clip_expand=tuple(clips[0]),
        clip_dw=tuple(clips[1]),
        clip_project=tuple(clips[2]),
    )
    allowed = block.stride in (1, 2) and block.dilation in (1, 2) and min(block[:3]) > 0
    lengths = [len(t) for t in (block.padding, *clips)]
    return block if kernel in (3, 5) and allowed and lengths == [4, 2, 2, 2] else None


def run(backend: str, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """The op on a backend that `choose` has named."""
    if torch.compiler.is_compiling():
        return (_reference if backend == "reference" else _ops[backend])(x, *arguments)
    count(backend)
    if backend == "reference":
        return _reference(x, *arguments)
    op = _ops[backend]
    # The op has no forward-mode derivative; the reference has.
    if forward_ad._current_level >= 0:
        return _reference(x, *arguments)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *arguments):
        return op(x, *arguments)
    # The dispatcher would find out in Python that there is nothing to differentiate, which takes a
    # tenth of a small block's time.
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, *arguments)


def _reference(*args) -> Tensor:
    device = args[0].device.type
    autocast = device in _AUTOCAST_KEYS and torch.is_autocast_enabled(device)
    cast = args
    if autocast:
        cast, _ = cast_for_autocast(device, args, torch.get_autocast_dtype(device))
    check(*cast)
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
def _backward_fake(grad_y, x, *args):
    tensors, needs_grad = (x, *args[:6]), args[13]
    wanted = (t for t, needed in zip(tensors, needs_grad, strict=True) if needed)
    grads = [t.new_empty(t.shape) for t in wanted]
    if needs_grad[0]:
        grads[0] = grads[0].to(memory_format=torch.channels_last)
    return grads


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


_library.impl("inverted_residual_backward", gradients.gradients, "CompositeExplicitAutograd")
torch.library.register_autograd("mnv2::inverted_residual_backward", _double_backward, lib=_library)
for _name in ("mnv2::inverted_residual", "mnv2::inverted_residual_triton"):
    torch.library.register_autograd(_name, _backward, setup_context=_setup_context, lib=_library)
    torch.library.register_vmap(_name, _no_vmap, lib=_library)


def cast_for_autocast(
    device: str, arguments: tuple[Any, ...], dtype: torch.dtype
) -> tuple[list[Any], bool]:
    """The op's arguments in the dtype of autocast, with biases in float32 as `fold` has them.

    What the layers of a block add to a float32 x is float32: if so, the result of these arguments
    is without the residual, and x is still to be added.
    """

    def cast(argument, dtype: torch.dtype):
        is_cast = isinstance(argument, Tensor) and argument.device.type == device
        return argument.to(dtype) if is_cast and argument.dtype in _AUTOCAST_FROM else argument

    found = [cast(a, torch.float32 if i in _BIASES else dtype) for i, a in enumerate(arguments)]
    kept = torch.promote_types(arguments[0].dtype, found[0].dtype) == found[0].dtype
    adds = arguments[10] and not kept
    if adds:
        check(*found)
        found[10] = False
    return found, adds


def _autocast(
    op: torch._ops.OpOverload, device: str, key: torch._C.DispatchKey
) -> Callable[..., Tensor]:
    """As `torch.library.register_autocast`, but in the dtype that the user has chosen."""
    keys = torch._C.DispatchKeySet(key)

    def cast_and_call(*arguments):
        cast, adds = cast_for_autocast(device, arguments, torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast) + arguments[0] if adds else op(*cast)

    return cast_and_call


for _name, _overload in (("inverted_residual", _op), ("inverted_residual_triton", _ops["triton"])):
    for _device, _key in _AUTOCAST_KEYS.items():
        _kernel = _autocast(_overload, _device, getattr(torch._C.DispatchKey, _key))
        _library.impl(_name, _kernel, _key)


@register_flop_formula([torch.ops.mnv2.inverted_residual, torch.ops.mnv2.inverted_residual_triton])
def _flops(x_shape, w_expand_shape, b_expand, w_dw_shape, *args, out_shape, **kwargs) -> int:
    """Two per multiply-add, as torch's own formulas; halo recomputation is not counted."""
    return 2 * sum(multiply_adds(x_shape, w_expand_shape, w_dw_shape, out_shape))


@register_flop_formula(torch.ops.mnv2.inverted_residual_backward)
def _backward_flops(
    grad_shape, x_shape, w_expand_shape, b_expand, w_dw_shape, *args, out_shape, **kwargs
) -> int:
    """The products that give the gradients asked for; recomputing the block is not counted."""
    expansion, depthwise, projection = multiply_adds(
        x_shape, w_expand_shape, w_dw_shape, grad_shape
    )
    x, w_expand, b_expand, w_dw, b_dw, w_project, _ = args[-1]
    through_expansion = x or w_expand or b_expand
    through_depthwise = through_expansion or w_dw or b_dw
    return 2 * (
        expansion * (w_expand + x)
        + depthwise * (w_dw + through_expansion)
        + projection * (w_project + through_depthwise)
    )


def multiply_adds(x_shape, w_expand_shape, w_dw_shape, y_shape) -> tuple[int, int, int]:
    """Of expansion, depthwise and projection."""
    batch, in_channels, height, width = x_shape
    kernel, _, hidden = w_dw_shape
    out_pixels = batch * math.prod(y_shape[2:])
    expansion = 0 if w_expand_shape is None else batch * height * width * in_channels * hidden
    return expansion, out_pixels * kernel * kernel * hidden, out_pixels * hidden * y_shape[1]
