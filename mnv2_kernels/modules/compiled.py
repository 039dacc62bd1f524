"""A block for inference in compiled programs: an op that folds when the layers have changed.

torch.compile records all that is computed, and folding of a network takes as long as half of it.
`torch.ops.mnv2.inverted_residual_layers` is the block from its unfolded layers; what it keeps of
one call for the next, the compiler does not see and need not: the result depends on the values
alone.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ..block.config import NO_PADDING
from ..block.fold import BlockLayers, flatten_layers, fold_flat
from ..ops.contract import check
from ..ops.inverted_residual import SETTINGS
from ..ops.registration import multiply_adds
from .guard import Change, Guard

_library = torch.library.Library("mnv2", "FRAGMENT")
# For each stage from the expansion on: which of the six tensors it has, one bit each, and the eps
# of its norm. `layers` are those tensors, stage by stage.
_library.define(
    "inverted_residual_layers(Tensor x, Tensor[] layers, int[] present, float[] eps,"
    f" {SETTINGS}) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
_op = torch.ops.mnv2.inverted_residual_layers.default


def folds_when_run(x: Tensor, block: BlockLayers) -> bool:
    """Whether a program that is being compiled should call this op on a CPU.

    Not for a block whose input is padded or which has more than clips between its layers: the op
    has neither. Not for gradients, which go through the folding, not under autocast, which would
    have to cast the folded weights, and not where inductor folds constants itself.
    """
    if block.pads != NO_PADDING or not block.only_clips:
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
    """The op on x and the layers of a block."""
    config = block.config
    settings = (config.stride, config.padding, config.dilation, config.residual)
    return _op(x, *flatten_layers(block), *settings, *block.clips)


class _Kept(NamedTuple):
    """Folded weights, and what they were folded from."""

    guard: Guard
    addresses: list[int]
    eps: list[float]
    folded: tuple


# By the weight of the projection, and dropped with it.
_cache = WeakTensorKeyDictionary()


def _folded(layers: list[Tensor], present: list[int], eps: list[float]) -> tuple:
    # Constants of a program and copies made by the compiler are no parameters: they may be others
    # in the next call, at the same address.
    if not all(isinstance(t, nn.Parameter) for t in layers if t.dim() == 4):
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


def _kernel(x, layers, present, eps, *settings):
    folded = _folded(layers, present, eps)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mnv2.inverted_residual.default(x, *folded, *settings)


def _fake(x, layers, present, eps, *settings):
    shape = check(x, *fold_flat(layers, present, eps), *settings)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def _flops(x_shape, layers, present, *args, out_shape, **kwargs) -> int:
    convs = [shape for shape in layers if len(shape) == 4]
    hidden, kernel = convs[-2][0], convs[-2][2]
    w_expand = (convs[0][1], hidden) if len(convs) == 3 else None
    return 2 * sum(multiply_adds((x_shape, w_expand, None, (kernel, kernel, hidden)), out_shape))


_name = "mnv2::inverted_residual_layers"
_library.impl("inverted_residual_layers", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake(_name, _fake, lib=_library)
register_flop_formula(torch.ops.mnv2.inverted_residual_layers)(_flops)
