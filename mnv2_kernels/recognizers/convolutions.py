"""What a convolution of another library pads; layers that only pad, drop values or do nothing."""

from torch import nn

from ..block.config import Padding
from .declined import Declined, describe

# Subclasses of Conv2d that pad as TensorFlow's SAME does, at run time: timm, lukemelas.
_DYNAMIC_SAME = ("Conv2dSame", "Conv2dDynamicSamePadding")


def is_identity(module: nn.Module) -> bool:
    """nn.Identity, or somebody's own class of that name with nothing inside."""
    if isinstance(module, nn.Identity):
        return type(module).forward is nn.Identity.forward
    empty = not (module._modules or module._parameters or module._buffers)
    return empty and type(module).__name__ == "Identity"


def is_drop(module: nn.Module) -> bool:
    """Dropout of any kind, which does nothing in evaluation mode; also timm's and torchvision's."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return type(module).__module__ == nn.Dropout.__module__
    empty = not (module._modules or module._parameters or module._buffers)
    return empty and type(module).__name__ in ("DropPath", "StochasticDepth")


def is_zero_pad(module: nn.Module) -> bool:
    """nn.ZeroPad2d, or nn.ConstantPad2d with the value 0."""
    return isinstance(module, nn.ConstantPad2d) and module.value == 0


def zero_pad(module: nn.ConstantPad2d) -> Padding:
    """The four sides of a zero padding layer; torch orders them (left, right, top, bottom)."""
    left, right, top, bottom = module.padding
    return top, left, bottom, right


def read_padding(conv: nn.Conv2d) -> Padding | None:
    """The zeros that a convolution pads with (top, left, bottom, right).

    None where they depend on the size of its input, as TensorFlow's SAME does at stride 2.
    """
    kind = describe(conv)
    if conv.padding_mode != "zeros":
        raise Declined(f"padding_mode must be 'zeros', got {conv.padding_mode!r}")
    if type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        raise Declined(f"{kind} overrides the convolution of nn.Conv2d")
    own = _own_padding(conv)
    if type(conv).forward is nn.Conv2d.forward:
        return own
    # lukemelas: the padding is computed once for the image size given at construction.
    static = conv._modules.get("static_padding")
    if static is not None and len(conv._modules) == 1:
        if is_identity(static):
            return own
        if is_zero_pad(static):
            return tuple(a + b for a, b in zip(zero_pad(static), own, strict=True))
    if type(conv).__name__ in _DYNAMIC_SAME and not conv._modules and own == (0, 0, 0, 0):
        return same_padding(conv)
    raise Declined(f"{kind} overrides the forward of nn.Conv2d")


def _own_padding(conv: nn.Conv2d) -> Padding:
    if conv.padding == "same":
        return _keeping_size(conv)
    vertical, horizontal = (0, 0) if conv.padding == "valid" else conv.padding
    return vertical, horizontal, vertical, horizontal


def same_padding(conv: nn.Conv2d) -> Padding | None:
    """What TensorFlow's SAME pads: None where it depends on the size of the input."""
    return _keeping_size(conv) if tuple(conv.stride) == (1, 1) else None


def _keeping_size(conv: nn.Conv2d) -> Padding:
    """SAME at stride 1: any size is kept; an odd zero goes to the bottom and to the right."""
    rows, columns = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return rows // 2, columns // 2, rows - rows // 2, columns - columns // 2
