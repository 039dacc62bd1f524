"""y of x and of the tensors of a block's layers, with the gradients that a backward pass asks for.

The forward pass runs on folded weights that were made without a graph; the backward pass computes
their gradients, and from them, in closed form, the gradients of the unfolded tensors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..block.config import NO_CLIP
from ..block.fold import BlockLayers, ConvNorm, FoldedWeights, fold_gate, fold_layers
from ..ops.extension import module as _C
from ..ops.inverted_residual import INVERTED_RESIDUAL, run
from ..ops.registration import cast_for_autocast


class StageTensors(NamedTuple):
    """What one convolution and the batch norm after it compute with; None where there is none.

    A stage without a norm has neither mean nor var.
    """

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


_TENSORS = len(StageTensors._fields) - 1
_NONE = StageTensors(*(None,) * _TENSORS, 0.0)
_PLAIN = (Tensor, nn.Parameter, type(None))

# All are compiled, for float32 on the CPU, and called by this package alone, below autograd.
# `layers` are six tensors a stage as in `StageTensors`.
#
# The first gives folded weight and bias of every stage. The second is the forward pass of a block
# with live norms, whose mean and variance are None: y, then what the projection gives, mean and
# covariance of x (empty where they are not needed), then mean and biased variance of the three
# stages in float64. The third gives the gradients that are needed of x (needs_grad[0]) and of the
# layers; mean and variance of a live norm are those of the batch there, and `saved` the three
# tensors after y, or none where no norm is live. The projection has no clip.
_library = torch.library.Library("mnv2", "FRAGMENT")
_library.define("fold_layers_cpu(Tensor?[] layers, float[] eps) -> Tensor[]")
_SETTINGS = (
    "float[] eps, bool[3] live, int stride, int[4] padding, int dilation, bool residual,"
    " float[2] clip_expand, float[2] clip_dw"
)
_library.define(
    f"inverted_residual_training_cpu(Tensor x, Tensor?[] layers, {_SETTINGS}) -> Tensor[]"
)
_library.define(
    "inverted_residual_training_backward_cpu(Tensor grad_y, Tensor x, Tensor?[] layers,"
    f" Tensor[] saved, {_SETTINGS}, bool[19] needs_grad) -> Tensor[]"
)


def run_with_gradients(
    backend: str, x: Tensor, arguments: tuple, stages: Sequence[StageTensors | None]
) -> Tensor:
    """The op `inverted_residual`, differentiable once in x and in every tensor of the stages.

    Args:
        backend: any that `choose` names but the reference, which is differentiable by itself.
        arguments: of the op after x, folded from exactly these stages, without a graph.
        stages: expansion (None where the block has none), depthwise and projection.
    """
    stages = [s or _NONE for s in stages]
    tensors = (t for stage in stages for t in stage[:_TENSORS])
    return _FromLayers.apply(backend, arguments, [s.eps for s in stages], x, *tensors)


def tensors_of(layers: BlockLayers) -> list[StageTensors | None]:
    """The tensors of expansion, depthwise and projection as they are now."""
    stages = (layers.expand, layers.depthwise, layers.project)
    return [None if stage is None else _tensors_of(stage) for stage in stages]


def _tensors_of(stage: ConvNorm) -> StageTensors:
    conv, norm = stage.conv, stage.norm
    if norm is None:
        return StageTensors(conv.weight, conv.bias, None, None, None, None, 0.0)
    statistics = (norm.running_mean, norm.running_var, norm.eps)
    return StageTensors(conv.weight, conv.bias, norm.weight, norm.bias, *statistics)


def fold_without_graph(layers: BlockLayers) -> FoldedWeights:
    """To the bit what `block.fold.fold_layers` gives, without a graph to the layers.

    In a few compiled calls for float32 on the CPU, since an optimizer's step changes all weights of
    a network.
    """
    # Not inference tensors: a later call may need gradients of x through them.
    with torch.inference_mode(False), torch.no_grad():
        present = [stage for stage in tensors_of(layers) if stage is not None]
        tensors = [t for stage in present for t in stage[:_TENSORS]]
        in_python = _C is None or torch._C._len_torch_dispatch_stack() > 0
        if in_python or layers.config.dense or not are_plain(tensors):
            return fold_layers(layers)
        if not all(t is None or (t.dtype is torch.float32 and t.is_cpu) for t in tensors):
            return fold_layers(layers)
        op = torch.ops.mnv2.fold_layers_cpu.default
        with torch._C._AutoDispatchBelowAutograd():
            folded = op(tensors, [stage.eps for stage in present])
        gate = None if layers.gate is None else fold_gate(layers.gate)
    return FoldedWeights(*(None,) * (6 - len(folded)), *folded, *layers.clips, gate)


def are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether none of them is of a class of its own."""
    return all(type(t) in _PLAIN for t in tensors)


def refuse_second_derivatives(instead: str) -> None:
    """Raise where a backward pass is recorded; `instead` says what has second derivatives.

    Not `once_differentiable`: where grad_y needs no gradient that gives zeros in silence.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "inverted_residual: create_graph=True asks for second derivatives, which are not"
            f" implemented; {instead}"
        )


class _FromLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: str, arguments: tuple, eps: list, *tensors: Tensor | None) -> Tensor:
        ctx.backend, ctx.arguments, ctx.eps = backend, arguments, eps
        device = tensors[0].device.type
        ctx.autocast = torch.get_autocast_dtype(device) if _casts(device) else None
        ctx.save_for_backward(*tensors)
        return run(backend, tensors[0], arguments)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("a model fused with backend='reference' has them")
        x, *tensors = ctx.saved_tensors
        needed = asked_for(ctx, (x, *tensors))
        if ctx.autocast is None and _is_compiled(ctx, grad_y, x, tensors):
            op = torch.ops.mnv2.inverted_residual_training_backward_cpu.default
            settings = (ctx.eps, [False] * len(ctx.eps), *ctx.arguments[6:12])
            with torch._C._AutoDispatchBelowAutograd():
                grads = iter(op(grad_y, x, tensors, [], *settings, needed))
            found = [next(grads) if needs else None for needs in needed]
        else:
            found = _by_stages(ctx, grad_y, x, tensors, needed)
        return None, None, None, *found


def _is_compiled(ctx, grad_y: Tensor, x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    return (
        ctx.backend == "cpu"
        and x.dtype is torch.float32
        and grad_y.dtype is torch.float32
        and ctx.arguments[12] == NO_CLIP
        and torch._C._len_torch_dispatch_stack() == 0
        and are_plain((grad_y, x, *tensors))
    )


def _by_stages(
    ctx, grad_y: Tensor, x: Tensor, tensors: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients that are needed, on any device and in any dtype."""
    needs_x, *needed = needed
    stages = [
        (
            StageTensors(*tensors[i : i + _TENSORS], eps),
            StageTensors(*needed[i : i + _TENSORS], eps),
        )
        for i, eps in zip(range(0, len(tensors), _TENSORS), ctx.eps, strict=True)
    ]
    needs_grad = [needs_x]
    for _, needs in stages:
        through_scale = needs.gamma or needs.var
        needs_bias = needs.bias or needs.beta or needs.mean or through_scale
        needs_grad += [needs.weight or through_scale, needs_bias]
    grads = iter(_gradients(grad_y, x, ctx.arguments, needs_grad, ctx.autocast))
    found = [next(grads) if needs_x else None]
    of_folded = [next(grads) if needs else None for needs in needs_grad[1:]]
    for i, (stage, needs) in enumerate(stages):
        found += unfold(stage, needs, *of_folded[2 * i : 2 * i + 2])
    return found


def _casts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def asked_for(ctx, tensors: Sequence[Tensor | None]) -> Sequence[bool]:
    """Which of the function's tensors need a gradient in this backward pass.

    `needs_input_grad` says which needed one in the forward pass; `torch.autograd.grad` and
    `backward(inputs=...)` may ask for a few of them. The engine knows as long as it runs this node
    itself; where something else calls it, as compiled autograd does, all count as asked for.
    """
    needed = ctx.needs_input_grad[-len(tensors) :]
    if _C is None or torch._C._current_autograd_node() is not ctx:
        return needed
    asked = iter(_C.asked_for())
    return [t is not None and next(asked) for t in tensors]


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    arguments: tuple,
    needs_grad: list[bool],
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """Of x and the folded weights, where they need one, in their dtypes."""
    op = torch.ops.mnv2.inverted_residual_backward.default
    if autocast is None:
        return op(grad_y, x, *arguments, needs_grad)
    # Autocast is off in a backward pass, and the forward pass has run with its casts.
    everything = (x, *arguments)
    cast, adds = cast_for_autocast(INVERTED_RESIDUAL, x.device.type, everything, autocast)
    wanted = [t for t, needs in zip(everything[:7], needs_grad, strict=True) if needs]
    found = op(grad_y.to(cast[0].dtype), *cast, needs_grad)
    grads = [g.to(t.dtype) for g, t in zip(found, wanted, strict=True)]
    if adds and needs_grad[0]:
        grads[0] = grads[0] + grad_y
    return grads


def unfold(
    stage: StageTensors, needs: StageTensors, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the six tensors, where they are needed, from the gradients of the folded ones.

    With s = gamma / sqrt(var + eps), the folded weight is weight * s, the folded bias
    (bias - mean) * s + beta. grad_weight has the layout of a folded weight, (k, k, C) or
    (C_in, C_out); it is needed for weight, gamma and var, grad_bias for all but weight. Vectors are
    computed in float64.
    """
    if not any(needs[:_TENSORS]):
        return [None] * _TENSORS
    weight, bias, gamma, beta, mean, var, eps = stage
    if grad_weight is not None:
        grad_weight = grad_weight.to(torch.promote_types(weight.dtype, torch.float32))
        if grad_weight.dim() == 3:
            grad_weight = grad_weight.permute(2, 0, 1)[:, None]
        else:
            grad_weight = grad_weight.t()[:, :, None, None]
    if grad_bias is not None:
        grad_bias = grad_bias.double()
    inverse = scale = None
    if var is not None:
        inverse = torch.rsqrt(var.double() + eps)
        scale = inverse if gamma is None else inverse * gamma.double()
    grads: list[Tensor | None] = [None] * _TENSORS
    if needs.weight:
        grads[0] = grad_weight
        if scale is not None:
            grads[0] = grad_weight * scale.to(grad_weight.dtype)[:, None, None, None]
    if needs.bias or needs.mean:
        grads[1] = grad_bias if scale is None else grad_bias * scale
        grads[4] = -grads[1] if needs.mean else None
    if needs.beta:
        grads[3] = grad_bias
    if needs.gamma or needs.var:
        centre = -mean.double() if bias is None else bias.double() - mean.double()
        of_scale = (grad_weight * weight).sum((1, 2, 3), dtype=torch.float64) + grad_bias * centre
        grads[2] = of_scale * inverse
        if needs.var:
            grads[5] = of_scale * scale / (-2 * (var.double() + eps))
    return [
        g.to(t.dtype).contiguous() if n else None
        for g, t, n in zip(grads, stage[:_TENSORS], needs[:_TENSORS], strict=True)
    ]
