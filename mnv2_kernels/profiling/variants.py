"""One network in several ways: eager, folded, fused; for training checkpointed too."""

from copy import deepcopy
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from ..fuse.find import find
from ..fuse.fuse import fuse
from ..fuse.sequential import FusedChain
from ..modules.fused_module import FusedModule


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """Copies of a network in evaluation mode, by name; the network itself is left as it is.

    "eager" runs layer by layer as written. "folded" does so too, with batch norm folded into the
    convolutions and channels_last weights: what PyTorch does best without a compiler. "fused" is
    the network after `fuse`, with channels_last weights.
    """
    folded = fold_around_blocks(plain(model))
    fused = fuse(model)
    for copy in (folded, fused):
        copy.to(memory_format=torch.channels_last)
    return {"eager": plain(model), "folded": folded, "fused": fused}


def training_variants(model: nn.Module) -> dict[str, nn.Module]:
    """Copies of a network in training mode with channels_last weights, by name.

    "eager" runs layer by layer. "checkpointed" does so too, but keeps the inputs of its blocks
    alone, and runs them a second time in the backward pass. "fused" is the network after `fuse`.
    """
    fused = fuse(model).train().to(memory_format=torch.channels_last)
    checkpointed = plain(fused)
    for module in checkpointed.modules():
        if isinstance(module, FusedModule):
            module.forward = partial(checkpoint, module.plain_forward, use_reentrant=False)
    return {"eager": plain(fused), "checkpointed": checkpointed, "fused": fused}


def plain(model: nn.Module) -> nn.Module:
    """A copy that runs all layers one by one, also in modules that could run fused."""
    copy = deepcopy(model)
    for module in copy.modules():
        if isinstance(module, FusedModule | FusedChain):
            module.forward = module.plain_forward
    return copy


def fused_blocks(model: nn.Module) -> dict[str, FusedModule]:
    """The modules of a network that can run in one pass, by their names in it."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FusedModule)}


def fold_around_blocks(model: nn.Module) -> nn.Module:
    """Fold every batch norm into the convolution registered right before it, in place.

    What runs fused folds its own and is left alone.
    """
    own = [f.fused for f in find(model) if f.fused is not None and "forward" not in vars(f.module)]
    skipped = {inner for block in own for inner in block.modules()}
    for parent in model.modules():
        if parent in skipped:
            continue
        for (name, conv), (next_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and conv not in skipped:
                after = _after_norm(norm)
                if after is not None:
                    setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                    setattr(parent, next_name, after)
    return model


def _after_norm(norm: nn.Module) -> nn.Module | None:
    """What a batch norm that can be folded does to its result; None for other modules.

    Those of timm have an activation inside, and could drop values before it.
    """
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return None
    if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
        return None
    return getattr(norm, "act", nn.Identity())
