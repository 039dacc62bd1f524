"""A block for inference in compiled programs: an op that folds when the layers have changed.

torch.compile records all that is computed, and folding of a network takes as long as half of it.
`torch.ops.mnv2.inverted_residual_layers` is the block from its unfolded layers, and
`torch.ops.mnv2.mbconv_layers` one with more than clips between them; what they keep of one call for
the next, the compiler does not see and need not: the result depends on the values alone.
"""

import sys
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ..block.config import NO_PADDING
from ..block.fold import BlockLayers, flatten_layers, fold_flat
from ..ops.inverted_residual import INVERTED_RESIDUAL
from ..ops.mbconv import MBCONV, numbered
from ..ops.registration import Op, multiply_adds
from .guard import Change, Guard


def folds_when_run(x: Tensor, block: BlockLayers) -> bool:
    """Whether a program that is being compiled should call such an op on a CPU.

    Not for a block with something before the op, not for gradients, which go through the folding,
    not under autocast, which would have to cast the folded weights, and not where inductor folds
    constants itself.
    """
    if block.pads != NO_PADDING or block.lead is not None:
        return False
    if not torch.compiler.is_dynamo_compiling() or torch.is_autocast_enabled("cpu") or _freezes():
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(t.requires_grad for t in (x, *flatten_layers(block)[0]))


def _freezes() -> bool:
    config = sys.modules.get("torch._inductor.config")
    return config is not None and config.freezing


# The compiler takes the answer of the moment it compiles.
_freezes._dynamo_marked_constant = True


def run_layers(x: Tensor, block: BlockLayers) -> Tensor:
    """The op of such a block on x and its layers."""
    config = block.config
    settings = (config.stride, config.padding, config.dilation, config.residual)
    if block.is_classic:
        op, between = torch.ops.mnv2.inverted_residual_layers.default, block.clips
    else:
        gate = block.gate
        of_gate = () if gate is None else (gate.squeeze.clip, gate.scale)
        op, between = torch.ops.mnv2.mbconv_layers.default, numbered(block.clips, *of_gate)
    return op(x, *flatten_layers(block), *settings, *between)


class _Kept(NamedTuple):
    """Folded weights, and what they were folded from."""

    guard: Guard
    addresses: list[int]
    eps: list[float]
    folded: tuple


# By the weight of the last stage, and dropped with it.
_cache = WeakTensorKeyDictionary()


def _folded(layers: list[Tensor], present: list[int], eps: list[float]) -> tuple:
    # Constants of a program and copies made by the compiler are no parameters: they may be others
    # in the next call, at the same address.
    if not all(isinstance(t, nn.Parameter) for t in layers if t.dim() > 1):
        with torch.inference_mode(False), torch.no_grad():
            return fold_flat(layers, present, eps)
    last = sum(bits.bit_count() for bits in present[:-1])
    addresses = [t.data_ptr() for t in layers]
    found = _cache.get(layers[last])
    same = found is not None and (found.addresses, found.eps) == (addresses, list(eps))
    if same and found.guard.check() is Change.SAME:
        return found.folded
    # Aliases share memory and version with the tensors, and do not keep them from being dropped.
    holder = nn.Module()
    for i, tensor in enumerate(layers):
        holder.register_buffer(str(i), tensor.detach())
    guard = Guard([holder])
    with torch.inference_mode(False), torch.no_grad():
        folded = fold_flat(layers, present, eps)
    _cache[layers[last]] = _Kept(guard, addresses, list(eps), folded)
    return folded


def _kernel(op: Op, x, layers, present, eps, *settings):
    folded = _folded(layers, present, eps)[: op.tensors - 1]
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.mnv2, op.name).default(x, *folded, *settings)


def _fake(op: Op, x, layers, present, eps, *settings):
    shape = op.check(x, *fold_flat(layers, present, eps)[: op.tensors - 1], *settings)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def _flops(x_shape, layers, present, *args, out_shape, **kwargs) -> int:
    # A stage's first tensor is its weight.
    starts = accumulate((bits.bit_count() for bits in present[:-1]), initial=0)
    weights = [layers[start] for start in starts]
    squeeze = weights[-2][:2] if len(weights) > 3 else None
    *expand, depthwise, _ = weights[:-2] if squeeze else weights
    hidden, channels, kernel, _ = depthwise
    w_expand = (expand[0][1], hidden) if expand else None
    w_dw = (kernel, kernel, *((channels,) if channels > 1 else ()), hidden)
    shapes = (x_shape, w_expand, None, w_dw, *(None,) * 3, squeeze)
    return 2 * sum(multiply_adds(shapes, out_shape))


_library = torch.library.Library("mnv2", "FRAGMENT")
for _op in (INVERTED_RESIDUAL, MBCONV):
    _name = f"{_op.name}_layers"
    # For each stage from the expansion on: which of the six tensors it has, one bit each, and the
    # eps of its norm. `layers` are those tensors, stage by stage.
    _library.define(
        f"{_name}(Tensor x, Tensor[] layers, int[] present, float[] eps, {_op.settings}) -> Tensor",
        tags=[torch.Tag.pt2_compliant_tag],
    )
    _library.impl(_name, partial(_kernel, _op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mnv2::{_name}", partial(_fake, _op), lib=_library)
    register_flop_formula(getattr(torch.ops.mnv2, _name))(_flops)
