"""One nn.Sequential and a flag: the form of torchvision and of most hand-written copies.

    conv = Sequential(Conv2d, BatchNorm2d, ReLU6, Conv2d, BatchNorm2d, ReLU6, Conv2d, BatchNorm2d)

with the first three left out at t = 1, grouped into Sequentials of any depth (torchvision's
Conv2dNormActivation and its older names, `residual = Sequential(Sequential(...), DepSepConv)`),
or with a ZeroPad2d before the depthwise. torchvision mobilenet_v2, mnasnet, and mobilenet_v3
where it has neither squeeze-excite nor hard swish; tonylins, d-li14 and their copies.
"""

from torch import nn

from ..block.fold import BlockLayers
from .convolutions import is_drop
from .layers import assemble, check_only, children, flatten, read_flag

_BODIES = ("conv", "convs", "layers", "block", "body", "residual", "bottleneck")
# Before the residual, where they do nothing in evaluation mode.
_DROPS = ("stochastic_depth", "drop_path", "dropout", "drop")
FLAGS = (
    "use_res_connect",
    "identity",
    "apply_residual",
    "use_residual",
    "has_residual",
    "is_residual",
    "residual",
    "residual_connection",
    "use_res",
    "res_connect",
    "has_skip",
    "use_skip",
    "skip",
    "skip_connection",
    "use_skip_connection",
    "use_shortcut",
    "shortcut",
    "use_identity",
    "add_residual",
    "connect",
)
# Expansion, depthwise, projection and the two of a squeeze-excite; more is a part of a network.
_MOST_CONVOLUTIONS = 5


def recognize(module: nn.Module) -> BlockLayers | None:
    """A block whose layers are one Sequential under one of the usual names."""
    if isinstance(module, nn.Sequential):
        return None
    names = [n for n in _BODIES if isinstance(module._modules.get(n), nn.Sequential)]
    if len(names) != 1:
        return None
    found = children(module)
    body = found[names[0]]
    flag = read_flag(module, FLAGS)
    if not _looks_like_block(body, flag):
        return None
    drops = {n: found[n] for n in _DROPS if n in found and is_drop(found[n])}
    check_only(module, (*names, *drops))
    return assemble([*flatten(body), *drops.values()], flag)


def _looks_like_block(body: nn.Module, flag: bool | None) -> bool:
    # Duck-typed, so that quantised convolutions count.
    convs = [m for m in body.modules() if hasattr(m, "kernel_size") and hasattr(m, "groups")]
    if not 2 <= len(convs) <= _MOST_CONVOLUTIONS:
        return False
    if any(c.groups == c.in_channels > 1 for c in convs):
        return True
    # FusedMBConv: expansion and depthwise are one full convolution.
    sizes = [tuple(c.kernel_size) for c in convs]
    return flag is not None and sizes[0] != (1, 1) and sizes[-1] == (1, 1)
