"""timm's blocks (`timm/models/_efficientnet_blocks.py`, `timm/layers/separable_conv.py`).

InvertedResidual and DepthwiseSeparableConv of mobilenetv1_*, mobilenetv2_*, efficientnet_lite*,
mnasnet_*, fbnetc, spnasnet and the blocks without squeeze-excite of others; mobilenetv4_*'s
UniversalInvertedResidual where its one depthwise stands in the middle. The activations live inside
the norms (BatchNormAct2d).
"""

from torch import nn

from ..block.fold import BlockLayers
from .convolutions import is_drop, is_identity
from .declined import Declined, describe
from .layers import assemble, check_only, children, flatten, read_flag

_INVERTED_RESIDUAL = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
# bn1 is the norm of the depthwise here; an activation in bn2 comes before the residual.
_DEPTHWISE_SEPARABLE = ("conv_dw", "bn1", "conv_pw", "bn2")
_UNIVERSAL = ("pw_exp", "dw_mid", "pw_proj")
_OPTIONAL = ("aa", "se", "drop_path", "dw_start", "dw_end", "layer_scale")
# Without a norm, an activation or a residual between or around them.
_SEPARABLE = (("conv_dw", "conv_pw", "bn"), ("conv_dw", "conv_pw"))


def recognize(module: nn.Module) -> BlockLayers | None:
    """A block with timm's names of the layers; space to depth comes as a further child."""
    found = children(module)
    for names in _SEPARABLE:
        if found.keys() == set(names) and type(module).__module__.startswith("timm."):
            return assemble([found[n] for n in names], residual=False)
    for names in (_INVERTED_RESIDUAL, _DEPTHWISE_SEPARABLE, _UNIVERSAL):
        if found.keys() >= set(names):
            break
    else:
        return None
    for name in _OPTIONAL:
        if name in found and not (is_identity(found[name]) or is_drop(found[name])):
            raise Declined(f"{name} is {describe(found[name])}, expected Identity")
    check_only(module, (*names, *_OPTIONAL))
    drops = [found[name] for name in _OPTIONAL if name in found]
    layers = [layer for name in names for layer in flatten(found[name])]
    return assemble([*layers, *drops], read_flag(module, ("has_skip",)))
