"""timm's InvertedResidual and DepthwiseSeparableConv (`timm/models/_efficientnet_blocks.py`).

mobilenetv2_*, mobilenetv1_*, efficientnet_lite*, mnasnet_*, fbnetc, spnasnet and the blocks
without squeeze-excite of others. The activations live inside the norms (BatchNormAct2d).
"""

from torch import nn

from ..fold import BlockLayers
from .convolutions import is_identity
from .declined import Declined, describe
from .layers import assemble, check_only, children, read_flag

_INVERTED_RESIDUAL = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
# bn1 is the norm of the depthwise here; an activation in bn2 comes before the residual.
_DEPTHWISE_SEPARABLE = ("conv_dw", "bn1", "conv_pw", "bn2")
_OPTIONAL = ("aa", "se", "drop_path")


def recognize(module: nn.Module) -> BlockLayers | None:
    """A block with timm's names of the layers; space to depth comes as a further child."""
    found = children(module)
    for names in (_INVERTED_RESIDUAL, _DEPTHWISE_SEPARABLE):
        if found.keys() >= set(names):
            break
    else:
        return None
    for name in _OPTIONAL:
        if name in found and not is_identity(found[name]):
            raise Declined(f"{name} is {describe(found[name])}, expected Identity")
    check_only(module, (*names, *_OPTIONAL))
    return assemble([found[n] for n in names], read_flag(module, ("has_skip",)))
