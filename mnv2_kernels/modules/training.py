"""A training step of a block: batch norms with the statistics of the batch, and no expanded tensor.

The kernel (csrc/torch/ops_training.cpp) goes over the batch chunk by chunk of hidden channels and
band by band of rows, and computes again in the backward pass what it did not keep: x, what the
projection gives and the statistics are all that is saved.
"""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..block.config import NO_CLIP
from ..block.fold import BlockLayers
from ..ops.backends import count
from ..ops.extension import missing
from .autograd import (
    StageTensors,
    are_plain,
    asked_for,
    refuse_second_derivatives,
    tensors_of,
)

_STAGE = len(StageTensors._fields) - 1


def why_untrained(layers: BlockLayers) -> str | None:
    """Why a block with batch norms in training mode trains layer by layer, whatever x is; None
    where the kernel trains it.
    """
    if missing is not None:
        return f"batch norm is in training mode, and there is no kernel for that: {missing}"
    if not layers.is_classic or layers.lead is not None or layers.clips[2] != NO_CLIP:
        return (
            "batch norm is in training mode, and only blocks of a 3x3 or 5x5 depthwise with clips"
            " before and after it train fused"
        )
    return None


def why_untrained_with(layers: BlockLayers, x: Tensor) -> str | None:
    """The same for an x (N, C, H, W) and the tensors of the layers as they are now."""
    tensors = [t for stage in tensors_of(layers) if stage is not None for t in stage[:_STAGE]]
    others = [t for t in (x, *tensors) if t is not None]
    if torch.is_autocast_enabled("cpu"):
        return "batch norm is in training mode under autocast"
    if not all(t.dtype is torch.float32 and t.is_cpu for t in others):
        return "batch norm is in training mode, and not all tensors are float32 on the CPU"
    if not are_plain(others):
        return "batch norm is in training mode, and a tensor is of a class of its own"
    height, width = layers.op_hw(*x.shape[2:])
    out_height, out_width = layers.config.output_hw(height, width)
    if x.shape[0] * min(height * width, out_height * out_width) <= 1:
        return "batch norm is in training mode and is given one value a channel"
    return None


def train_block(x: Tensor, layers: BlockLayers) -> Tensor:
    """y of x with the statistics of the batch, as the layers would compute it.

    Updates the running statistics of live norms as PyTorch does. Differentiable once in x and in
    every parameter.
    """
    stages, norms = tensors_of(layers), _norms(layers)
    live = [norm is not None and norm.training for norm in norms]
    config = layers.config
    settings = (
        [0.0 if stage is None else stage.eps for stage in stages],
        live,
        config.stride,
        list(config.padding),
        config.dilation,
        config.residual,
        *map(list, layers.clips[:2]),
    )
    tensors: list[Tensor | None] = []
    for stage, is_live in zip(stages, live, strict=True):
        own = [None] * _STAGE if stage is None else list(stage[:_STAGE])
        tensors += [*own[:4], None, None] if is_live else own
    x = x.contiguous(memory_format=torch.channels_last)
    statistics: list[Tensor] = []
    count("cpu")
    y = _Training.apply(settings, statistics, x, *tensors)
    counts = (x.shape[2] * x.shape[3], y.shape[2] * y.shape[3], y.shape[2] * y.shape[3])
    for i, norm in enumerate(norms):
        if norm is not None and norm.training:
            move_statistics(norm, *statistics[2 * i : 2 * i + 2], len(x) * counts[i])
    return y


def _norms(layers: BlockLayers) -> list[_BatchNorm | None]:
    """Of expansion, depthwise and projection; None where there is none, or none of PyTorch's."""
    stages = (layers.expand, layers.depthwise, layers.project)
    norms = [None if stage is None else stage.norm for stage in stages]
    return [norm if isinstance(norm, _BatchNorm) else None for norm in norms]


def _statistics_of(live: list[bool]) -> list[int]:
    """Where mean and variance of live norms are among the tensors of the stages."""
    return [i for i in range(3 * _STAGE) if live[i // _STAGE] and i % _STAGE >= _STAGE - 2]


@torch.no_grad()
def move_statistics(norm: _BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics as the forward of a batch norm does, given mean and biased
    variance of `count` values a channel.
    """
    if not norm.track_running_stats:
        return
    share = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            share = 1.0 / float(norm.num_batches_tracked)
    if norm.running_mean is None:
        return
    norm.running_mean.mul_(1 - share).add_(mean.float(), alpha=share)
    # The unbiased variance.
    norm.running_var.mul_(1 - share).add_(var.float(), alpha=share * count / (count - 1))


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, settings: tuple, statistics: list[Tensor], x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, *rest = torch.ops.mnv2.inverted_residual_training_cpu.default(x, tensors, *settings)
        saved, found = rest[:3], rest[3:]
        statistics += found
        of_batch = list(tensors)
        for i in _statistics_of(settings[1]):
            of_batch[i] = found[i // _STAGE * 2 + i % 2]
        ctx.settings = settings
        ctx.save_for_backward(x, *of_batch, *saved)
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("`unfuse` gives the original layers back, which have them")
        x, *tensors = ctx.saved_tensors
        layers, saved = tensors[: 3 * _STAGE], tensors[3 * _STAGE :]
        given = list(layers)
        for i in _statistics_of(ctx.settings[1]):
            given[i] = None
        needed = asked_for(ctx, (x, *given))
        op = torch.ops.mnv2.inverted_residual_training_backward_cpu.default
        with torch._C._AutoDispatchBelowAutograd():
            grads = iter(op(grad_y, x, layers, saved, *ctx.settings, needed))
        return None, None, *(next(grads) if needs else None for needs in needed)
