"""The op of blocks that MobileNetV2 does not have, `torch.ops.mnv2.mbconv`.

MBConv is EfficientNet's word for an inverted residual with a squeeze-excite and another activation
(arXiv 1905.11946). A w_dw of four dimensions, (k, k, C_in, C_hidden), is a convolution of all
channels in the place of expansion and depthwise, as in FusedMBConv (arXiv 2104.00298). The CPU has
a kernel (csrc/torch, where the extension is built); everywhere else the op is the reference.
Triton's kernels, for most of these blocks, have a twin of the op, `mbconv_triton`.
"""

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..block.config import NO_CLIP, SCALES, Activation, Padding, Scale, curve_and_clip
from ..block.fold import FoldedWeights
from . import gradients, reference, triton
from .contract import check_mbconv
from .registration import Op, register
from .twins import register_twin

_TENSORS = (
    "Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_dw, Tensor? b_dw,"
    " Tensor w_project, Tensor? b_project,"
    " Tensor? w_squeeze, Tensor? b_squeeze, Tensor? w_excite, Tensor? b_excite"
)
# `curves` say what follows expansion, depthwise, projection and squeeze: 0 a clip, else one more
# than the place in CURVES. `bounds` are lower and upper of each, infinite where a curve stands.
# `scale` is the place in SCALES, 0 without a gate.
_SETTINGS = (
    "int stride, int[4] padding, int dilation, bool residual, int[4] curves, float[8] bounds,"
    " int scale"
)

_library = torch.library.Library("mnv2", "FRAGMENT")
_library.define(f"mbconv({_TENSORS}, {_SETTINGS}) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
_library.define(
    f"mbconv_backward(Tensor grad_y, {_TENSORS}, {_SETTINGS}, bool[11] needs_grad) -> Tensor[]",
    tags=[torch.Tag.pt2_compliant_tag],
)
MBCONV = Op("mbconv", 11, _SETTINGS, check_mbconv, gradients.mbconv_gradients)


class MBConvArguments(NamedTuple):
    """All arguments of the op but x."""

    w_expand: Tensor | None
    b_expand: Tensor | None
    w_dw: Tensor
    b_dw: Tensor | None
    w_project: Tensor
    b_project: Tensor | None
    w_squeeze: Tensor | None
    b_squeeze: Tensor | None
    w_excite: Tensor | None
    b_excite: Tensor | None
    stride: int
    padding: Padding
    dilation: int
    residual: bool
    curves: tuple[int, ...]
    bounds: tuple[float, ...]
    scale: int


def mbconv_arguments(
    weights: FoldedWeights, settings: tuple[int, Padding, int, bool]
) -> MBConvArguments:
    """The arguments for weights of any kind; settings are stride, padding, dilation, residual."""
    gate = weights.gate
    if gate is None:
        tensors, between = (None,) * 4, numbered(weights.clips())
    else:
        tensors, between = gate.tensors(), numbered(weights.clips(), gate.squeeze, gate.scale)
    return MBConvArguments(*weights.tensors(), *tensors, *settings, *between)


def numbered(
    clips: tuple[Activation, ...], squeeze: Activation = NO_CLIP, scale: Scale = SCALES[0]
) -> tuple[tuple[int, ...], tuple[float, ...], int]:
    """What follows the layers, as the op's curves, bounds and scale."""
    after = (*clips, squeeze)
    curves, bounds = zip(*map(curve_and_clip, after), strict=True)
    return curves, tuple(chain(*bounds)), SCALES.index(scale)


def _kernel(*arguments) -> Tensor:
    check_mbconv(*arguments)
    return reference.mbconv_op(*arguments)


# A kernel of a device comes before it.
_library.impl("mbconv", _kernel, "CompositeExplicitAutograd")
register(_library, MBCONV)
register_twin(
    _library,
    MBCONV,
    f"({_TENSORS}, {_SETTINGS}) -> Tensor",
    lambda *args: triton.mbconv(*args),
)
