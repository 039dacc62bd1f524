"""A block for inference in compiled programs: an op that folds when the layers have changed.

torch.compile records all that is computed, and folding of a network takes as long as half of it.
`torch.ops.mnv2.inverted_residual_layers` is the block from its unfolded layers; what it keeps of
one call for the next, the compiler does not see and need not: the result depends on the values
alone.
"""

import sys
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ..block.fold import BlockLayers, ConvNorm, fold_layers
from ..ops.contract import check
from ..ops.inverted_residual import SETTINGS, multiply_adds
from .versions import state_of

_library = torch.library.Library("mnv2", "FRAGMENT")
# For each stage from the expansion on: which of the six tensors it has, one bit each, and the eps
# of its norm. `layers` are those tensors, stage by stage.
_library.define(
    "inverted_residual_layers(Tensor x, Tensor[] layers, int[] present, float[] eps,"
    f" {SETTINGS}) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
_op = torch.ops.mnv2.inverted_residual_layers.default
_TENSORS = (
    ("conv", "weight"),
    ("conv", "bias"),
    ("norm", "weight"),
    ("norm", "bias"),
    ("norm", "running_mean"),
    ("norm", "running_var"),
)


def folds_when_run(x: Tensor, block: BlockLayers) -> bool:
    """Whether a program that is being compiled should call this op on a CPU.

    Not for gradients, which go through the folding, not under autocast, which would have to cast
    the folded weights, and not where inductor folds constants itself.
    """
    if not torch.compiler.is_dynamo_compiling() or torch.is_autocast_enabled("cpu") or _freezes():
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(t.requires_grad for t in (x, *_flatten(block)[0]))


def _freezes() -> bool:
    config = sys.modules.get("torch._inductor.config")
    return config is not None and config.freezing


# The compiler takes the answer of the moment it compiles.
_freezes._dynamo_marked_constant = True


def run_layers(x: Tensor, block: BlockLayers) -> Tensor:
    """The op on x and the layers of a block."""
    config = block.config
    settings = (config.stride, config.padding, config.dilation, config.residual)
    return _op(x, *_flatten(block), *settings, *block.clips)


def _flatten(block: BlockLayers) -> tuple[list[Tensor], list[int], list[float]]:
    layers, present, eps = [], [], []
    for stage in block.stages:
        bits = 0
        for bit, (module, name) in enumerate(_TENSORS):
            owner = getattr(stage, module)
            tensor = None if owner is None else getattr(owner, name)
            if tensor is not None:
                layers.append(tensor)
                bits |= 1 << bit
        present.append(bits)
        eps.append(0.0 if stage.norm is None else stage.norm.eps)
    return layers, present, eps


def fold_flat(
    layers: list[Tensor], present: list[int], eps: list[float]
) -> tuple[Tensor | None, ...]:
    """The six folded tensors of what `_flatten` made of a block."""
    tensors = iter(layers)
    stages: list[ConvNorm | None] = []
    for bits, norm_eps in zip(present, eps, strict=True):
        conv, norm = SimpleNamespace(), SimpleNamespace(eps=norm_eps)
        for bit, (module, name) in enumerate(_TENSORS):
            owner = conv if module == "conv" else norm
            setattr(owner, name, next(tensors) if bits >> bit & 1 else None)
        stages.append(ConvNorm(conv, None if norm.running_var is None else norm))
    expand = stages.pop(0) if len(stages) == 3 else None
    return fold_layers(BlockLayers(expand, *stages, config=None)).tensors()


# By the weight of the projection, and dropped with it.
_cache = WeakTensorKeyDictionary()


def _folded(layers: list[Tensor], present: list[int], eps: list[float]) -> tuple:
    # Constants of a program and copies made by the compiler are no parameters: their memory may be
    # written to without being counted.
    last = sum(bits.bit_count() for bits in present[:-1])
    key, state = layers[last], None
    if all(isinstance(t, torch.nn.Parameter) for t in layers if t.dim() == 4):
        state = state_of(layers, eps)
    found = _cache.get(key) if state is not None else None
    if found is not None and found[0] == state:
        return found[1]
    with torch.inference_mode(False), torch.no_grad():
        folded = fold_flat(layers, present, eps)
        if state is not None:
            # The aliases keep the old storages alive, so that no new tensor gets their address.
            _cache[key] = (state, folded, [t.detach() for t in layers])
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
    return 2 * sum(multiply_adds(x_shape, w_expand, (kernel, kernel, hidden), out_shape))


_name = "mnv2::inverted_residual_layers"
_library.impl("inverted_residual_layers", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake(_name, _fake, lib=_library)
register_flop_formula(torch.ops.mnv2.inverted_residual_layers)(_flops)
