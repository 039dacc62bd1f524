"""Every stage a child of its own: KernelBench's MBConv and what is written like it.

    expand_conv, depthwise_conv, project_conv = Sequential(Conv2d, BatchNorm2d, ReLU6), ...

with the expansion left out at t = 1, and a flag for the residual.
"""

from torch import nn

from ..block.fold import BlockLayers
from .layers import assemble, check_only, children, flatten, read_flag
from .sequential import FLAGS

_STAGES = (
    ("expand_conv", "depthwise_conv", "project_conv"),
    ("expand", "depthwise", "project"),
    ("expansion", "depthwise", "projection"),
)


def recognize(module: nn.Module) -> BlockLayers | None:
    """A block whose stages are nn.Sequential under these names."""
    found = children(module)
    for names in _STAGES:
        if all(isinstance(found.get(name), nn.Sequential) for name in names[1:]):
            check_only(module, names)
            stages = [layer for name in names if name in found for layer in flatten(found[name])]
            return assemble(stages, read_flag(module, FLAGS))
    return None
