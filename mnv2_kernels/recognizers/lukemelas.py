"""lukemelas' MBConvBlock (EfficientNet-PyTorch and packages made from it) without squeeze-excite.

EfficientNet-Lite: `_swish` is one ReLU6 used twice; the convolutions pad as TensorFlow does, for
the image size given at construction. The second argument of its forward, drop_connect_rate, does
nothing in evaluation mode.
"""

from torch import nn

from ..fold import BlockLayers
from .declined import Declined
from .layers import assemble, check_only, children

_EXPANSION = ("_expand_conv", "_bn0", "_swish")
_REST = ("_depthwise_conv", "_bn1", "_swish", "_project_conv", "_bn2")


def recognize(module: nn.Module) -> BlockLayers | None:
    """A block with the names of the layers that this family uses."""
    found = children(module)
    if not found.keys() >= set(_REST):
        return None
    if "_se_reduce" in found or "_se_expand" in found:
        raise Declined("it has squeeze-excite (_se_reduce, _se_expand)")
    order = (*_EXPANSION, *_REST) if "_expand_conv" in found else _REST
    check_only(module, order)
    return assemble([found[n] for n in order if n in found], _residual(module))


def _residual(module: nn.Module) -> bool | None:
    """The condition of the block's forward, which reads the block's arguments each time."""
    try:
        arguments, id_skip = module._block_args, module.id_skip
        same_channels = arguments.input_filters == arguments.output_filters
        return bool(id_skip and arguments.stride == 1 and same_channels)
    except AttributeError:
        return None
