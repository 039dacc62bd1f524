"""lukemelas' MBConvBlock (EfficientNet-PyTorch and packages made from it) without squeeze-excite.

EfficientNet-Lite: `_swish` is one ReLU6 used twice; the convolutions pad as TensorFlow does, for
the image size given at construction or, without one, at run time. The second argument of its
forward, drop_connect_rate, does nothing in evaluation mode. The copy in segmentation_models_pytorch
keeps its residual flag in `_has_drop_connect` and an Identity where there is no expansion.
"""

from torch import nn

from ..block.fold import BlockLayers
from .convolutions import is_identity
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
    check_only(module, (*_EXPANSION, *_REST))
    expands = any(n in found and not is_identity(found[n]) for n in ("_expand_conv", "_bn0"))
    order = (*_EXPANSION, *_REST) if expands else _REST
    return assemble([found[n] for n in order if n in found], _residual(module))


def _residual(module: nn.Module) -> bool | None:
    """The condition of the block's forward, which reads the block's arguments each time."""
    flag = getattr(module, "_has_drop_connect", None)
    if isinstance(flag, bool):
        return flag
    try:
        arguments, id_skip = module._block_args, module.id_skip
        same_channels = arguments.input_filters == arguments.output_filters
        return bool(id_skip and arguments.stride == 1 and same_channels)
    except AttributeError:
        return None
