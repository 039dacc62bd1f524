"""THE op, `torch.ops.mnv2.inverted_residual`: its schema, and the function that calls it.

Kernels register themselves for their device under this one schema (csrc/torch/ops_cpu.cpp for CPU,
csrc/torch/ops_cuda.cpp for CUDA; where the latter is not built, the Triton kernel does); everything
that PyTorch needs to know beyond the kernel is in registration.py, once for all of them. The Triton
kernel has a twin of the op, `inverted_residual_triton`, into which torch.compile can look. Blocks
with more than clips between their layers go to another op, `mbconv`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..block.config import (
    MAX_EXTENT,
    BlockConfig,
    Clip,
    Padding,
    is_classic,
    same_padding,
)
from ..block.fold import FoldedWeights
from . import gradients, reference, triton
from .backends import Block, choose, count, load
from .contract import check, check_kinds
from .mbconv import MBCONV, MBConvArguments, mbconv_arguments
from .registration import AUTOCAST_KEYS, Op, cast_for_autocast, register
from .twins import register_twin

_TENSORS = (
    "Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_dw, Tensor? b_dw,"
    " Tensor w_project, Tensor? b_project"
)
_SETTINGS = (
    "int stride, int[4] padding, int dilation, bool residual,"
    " float[2] clip_expand, float[2] clip_dw, float[2] clip_project"
)

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
# The part of it that is compiled, for float32 on the CPU: up to w_project, of the gradient before
# clip_project; the residual's part of x is left out.
_library.define(
    "inverted_residual_backward_cpu(Tensor grad_y, Tensor x, Tensor? w_expand, Tensor? b_expand,"
    " Tensor w_dw, Tensor? b_dw, Tensor w_project, int stride, int[4] padding, int dilation,"
    " float[2] clip_expand, float[2] clip_dw, bool[6] needs_grad) -> Tensor[]"
)
_op = torch.ops.mnv2.inverted_residual.default
INVERTED_RESIDUAL = Op("inverted_residual", 7, _SETTINGS, check, gradients.gradients)
_twin = register_twin(
    _library,
    INVERTED_RESIDUAL,
    f"({_TENSORS}, {_SETTINGS}) -> Tensor",
    lambda *args: triton.inverted_residual(*args),
)
load(_library, _twin)
register(_library, INVERTED_RESIDUAL)
_ops = {"cpu": _op, "cuda": _op, "triton": torch.ops.mnv2.inverted_residual_triton.default}
_mbconv_ops = {
    "cpu": torch.ops.mnv2.mbconv.default,
    # For arguments that break the contract, which it says.
    "cuda": torch.ops.mnv2.mbconv.default,
    "triton": torch.ops.mnv2.mbconv_triton.default,
}


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
        weights: from `fold`; their clips or curves are applied after each stage, and their gate
            before the projection.
        stride: of the depthwise, 1 or 2.
        padding: zeros around the clipped expansion, (top, left, bottom, right), each smaller
            than the kernel's extent; None keeps the size at stride 1.
        dilation: of the depthwise, at most 144 / (kernel size - 1); 1 for a dense convolution.
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
    kernel_size = weights.w_dw.shape[0] if weights.w_dw.dim() else 0
    arguments = _arguments(weights, kernel_size, (stride, padding, dilation, residual))
    block = _block(arguments) if x.is_cuda or backend == "triton" else None
    return run(choose(backend, x, block), x, arguments)


class OpArguments(NamedTuple):
    """All arguments of the op but x. `MBConvArguments` are those of the other op."""

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


def op_arguments(weights: FoldedWeights, config: BlockConfig) -> OpArguments | MBConvArguments:
    """The arguments of the op that runs a block of these sizes."""
    sizes = (config.stride, config.padding, config.dilation, config.residual)
    return _arguments(weights, config.kernel_size, sizes)


def _arguments(
    weights: FoldedWeights, kernel_size: int, settings: tuple[int, Padding, int, bool]
) -> OpArguments | MBConvArguments:
    kind = (weights.gate is not None, weights.is_dense, kernel_size, settings[2])
    if is_classic(weights.clips(), *kind):
        return OpArguments(*weights.tensors(), *settings, *weights.clips())
    return mbconv_arguments(weights, settings)


def _block(arguments: OpArguments | MBConvArguments) -> Block | None:
    """What a choice looks at of an op's arguments; None where these break the contract."""
    w_expand, w_dw, w_project = arguments.w_expand, arguments.w_dw, arguments.w_project
    if isinstance(arguments, MBConvArguments):
        clips = reference.activations(arguments.curves, arguments.bounds)[:3]
        gate = arguments.w_squeeze is not None
    else:
        clips = [arguments.clip_expand, arguments.clip_dw, arguments.clip_project]
        gate = False
    clips = [clip if isinstance(clip, str) else tuple(clip) for clip in clips]
    dense = w_dw.dim() == 4
    if w_dw.dim() not in (3, 4) or w_project.dim() != 2:
        return None
    if w_expand is not None and (dense or w_expand.dim() != 2):
        return None
    kernel, _, *_, hidden = w_dw.shape
    block = Block(
        in_channels=w_dw.shape[2] if w_expand is None else w_expand.shape[0],
        hidden_channels=hidden,
        out_channels=w_project.shape[1],
        expansion=w_expand is not None,
        kernel_size=kernel,
        stride=arguments.stride,
        dilation=arguments.dilation,
        padding=tuple(arguments.padding),
        residual=arguments.residual,
        clip_expand=clips[0],
        clip_dw=clips[1],
        clip_project=clips[2],
        gate=gate,
        dense=dense,
    )
    allowed = block.stride in (1, 2) and block.dilation > 0 and min(block[:3]) > 0
    allowed = allowed and block.dilation * (kernel - 1) <= MAX_EXTENT
    lengths = len(block.padding) == 4 and all(isinstance(c, str) or len(c) == 2 for c in clips)
    kernels = (1, 3, 5) if dense else (3, 5, 7)
    return block if kernel in kernels and allowed and lengths else None


def run(backend: str, x: Tensor, arguments: OpArguments | MBConvArguments) -> Tensor:
    """The op of these arguments on a backend that `choose` has named."""
    ops = _mbconv_ops if isinstance(arguments, MBConvArguments) else _ops
    if torch.compiler.is_compiling():
        if backend == "reference":
            return _reference(x, arguments)
        return ops[backend](x, *arguments)
    count(backend)
    # The ops have no forward-mode derivative; the reference has.
    if backend == "reference" or forward_ad._current_level >= 0:
        return _reference(x, arguments)
    op = ops[backend]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *arguments):
        return op(x, *arguments)
    # The dispatcher would find out in Python that there is nothing to differentiate, which takes a
    # tenth of a small block's time.
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, *arguments)


def _reference(x: Tensor, arguments: OpArguments | MBConvArguments) -> Tensor:
    op, compute = INVERTED_RESIDUAL, reference.inverted_residual_op
    if isinstance(arguments, MBConvArguments):
        op, compute = MBCONV, reference.mbconv_op
    device, cast = x.device.type, (x, *arguments)
    if device in AUTOCAST_KEYS and torch.is_autocast_enabled(device):
        cast, _ = cast_for_autocast(op, device, cast, torch.get_autocast_dtype(device))
    op.check(*cast)
    return compute(x, *arguments)
