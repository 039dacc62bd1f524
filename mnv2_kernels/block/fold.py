"""Batch norm folding, and the one weight layout that every kernel reads.

Activations are channels_last (NHWC in memory); in every weight the output channels are innermost:

    w_expand  (C_in, C_hidden)      w_dw  (k, k, C_hidden)      w_project  (C_hidden, C_out)

or, of a dense block, which has no w_expand,

    w_dw  (k, k, C_in, C_hidden)    w_project  (C_hidden, C_out)

all contiguous; biases are 1-D, float32 for half-precision weights. A kernel can then load
consecutive output channels as one vector.
"""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .config import (
    NO_CLIP,
    NO_PADDING,
    RELU,
    Activation,
    BlockConfig,
    Padding,
    Scale,
    is_classic,
    output_size,
)


@dataclass(frozen=True)
class FoldedGate:
    """The weights of a squeeze-excite (arXiv 1709.01507): channel c of the depthwise result times

        scale(w_excite[:, c] . squeeze(w_squeeze^T . m + b_squeeze) + b_excite[c])

    where m are the means of all channels over the pixels of an image. w_squeeze (C_hidden, R),
    b_squeeze (R,), w_excite (R, C_hidden), b_excite (C_hidden,).
    """

    w_squeeze: Tensor
    b_squeeze: Tensor | None
    w_excite: Tensor
    b_excite: Tensor | None
    squeeze: Activation = RELU
    scale: Scale = "sigmoid"

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The four tensors in the order of the op's arguments."""
        return self.w_squeeze, self.b_squeeze, self.w_excite, self.b_excite


@dataclass(frozen=True, repr=False)
class FoldedWeights:
    """The weights of one block with batch norm folded in, and what is between its layers.

    w_expand (C_in, C_hidden) and b_expand (C_hidden,) are None for a block without expansion
    (t = 1). w_dw (k, k, C_hidden), b_dw (C_hidden,), w_project (C_hidden, C_out), b_project
    (C_out,). A dense block has w_dw (k, k, C_in, C_hidden) and no w_expand. A clip is
    (lower, upper): (0, 6) is ReLU6, (0, inf) ReLU, (-inf, inf) none. In its place may be the name
    of a curve: "hardswish", "silu", "gelu" or "gelu_tanh". `clip_project` is applied before the
    residual is added. `gate` is the squeeze-excite before the projection, if there is one. Weights
    have the dtype of x, biases that dtype or float32.

    Example:
        >>> mk.fold(mk.InvertedResidual(16, 24)).to(torch.bfloat16).w_dw.dtype
        torch.bfloat16
    """

    w_expand: Tensor | None
    b_expand: Tensor | None
    w_dw: Tensor
    b_dw: Tensor | None
    w_project: Tensor
    b_project: Tensor | None
    clip_expand: Activation = (0.0, 6.0)
    clip_dw: Activation = (0.0, 6.0)
    clip_project: Activation = NO_CLIP
    gate: FoldedGate | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The six tensors in the order of the op's arguments."""
        return (
            self.w_expand,
            self.b_expand,
            self.w_dw,
            self.b_dw,
            self.w_project,
            self.b_project,
        )

    def clips(self) -> tuple[Activation, Activation, Activation]:
        """What follows the three layers, in the order of the op's arguments."""
        return self.clip_expand, self.clip_dw, self.clip_project

    @property
    def is_dense(self) -> bool:
        """Whether a convolution of all channels is in the place of expansion and depthwise."""
        return self.w_expand is None and self.w_dw.dim() == 4

    def __repr__(self) -> str:
        """Shapes instead of values."""
        shown = {"dtype": self.w_dw.dtype}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, FoldedGate):
                value = f"{value.w_squeeze.shape[1]} channels, {value.squeeze}, {value.scale}"
            shown[field.name] = tuple(value.shape) if isinstance(value, Tensor) else value
        return f"FoldedWeights({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def to(self, *args: Any, **kwargs: Any) -> "FoldedWeights":
        """A copy whose tensors went through `Tensor.to(*args, **kwargs)`."""
        gate = None if self.gate is None else _moved(self.gate, *args, **kwargs)
        return replace(_moved(self, *args, **kwargs), gate=gate)


def _moved(weights: Any, *args: Any, **kwargs: Any) -> Any:
    """A dataclass whose tensors went through `Tensor.to`."""
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    tensors = {name: t for name, t in values.items() if isinstance(t, Tensor)}
    return replace(weights, **{name: t.to(*args, **kwargs) for name, t in tensors.items()})


@dataclass(frozen=True)
class ConvNorm:
    """A convolution, the batch norm after it (or None), and the clip or curve after that.

    `conv` is any module with weight and bias, `norm` any with running_mean, running_var, eps,
    weight and bias; a bias and the norm's weight may be None.
    """

    conv: nn.Module
    norm: nn.Module | None
    clip: Activation = NO_CLIP

    def tensors(self) -> list[Tensor]:
        """What weight and bias are folded from."""
        names = ("weight", "bias", "running_mean", "running_var")
        found = [getattr(m, n, None) for m in (self.conv, self.norm) for n in names]
        return [t for t in found if isinstance(t, Tensor)]


@dataclass(frozen=True)
class GateLayers:
    """A squeeze-excite: two fully connected layers or 1x1 convolutions, of the means over all
    pixels, and what the second one's result goes through before it multiplies the channels.
    """

    squeeze: ConvNorm
    excite: ConvNorm
    scale: Scale


@dataclass(frozen=True)
class LeadConv:
    """A depthwise convolution in front of a block, without an activation (MobileNetV4,
    arXiv 2404.10518).
    """

    stage: ConvNorm
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]


@dataclass(frozen=True, eq=False)
class BlockLayers:
    """The layers of one block in the order they run, and the sizes that its forward gives them.

    `config.padding` is what the depthwise really sees, whatever applies it, and `config.residual`
    what the forward does. Where the input is padded before the expansion, or goes through another
    depthwise first, `config` describes the block of what comes of that, without a residual: `pads`
    are these zeros, `lead` is that depthwise, and `adds` says whether the input as it came is added
    to the result. `gate` comes between depthwise and projection. Of a dense block, `depthwise` is
    the convolution of all channels.
    """

    expand: ConvNorm | None
    depthwise: ConvNorm
    project: ConvNorm
    config: BlockConfig
    pads: Padding = NO_PADDING
    adds: bool = False
    gate: GateLayers | None = None
    lead: LeadConv | None = None

    @property
    def op_stages(self) -> tuple[ConvNorm, ...]:
        """Those that the op computes; those of the gate last."""
        found = (self.expand, self.depthwise, self.project)
        gate = () if self.gate is None else (self.gate.squeeze, self.gate.excite)
        return (*(stage for stage in found if stage is not None), *gate)

    @property
    def stages(self) -> tuple[ConvNorm, ...]:
        """All that there are."""
        return (*(() if self.lead is None else (self.lead.stage,)), *self.op_stages)

    def op_hw(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the op gets, where the block gets height x width."""
        top, left, bottom, right = self.pads
        height, width = height + top + bottom, width + left + right
        if self.lead is None:
            return height, width
        top, left, bottom, right = self.lead.padding
        kernel, stride, dilation = self.lead.kernel_size, self.lead.stride, self.lead.dilation
        return (
            output_size(height, kernel[0], stride[0], top, bottom, dilation[0]),
            output_size(width, kernel[1], stride[1], left, right, dilation[1]),
        )

    def fits(self, height: int, width: int) -> bool:
        """Whether something comes of an image of height x width."""
        window = (self.config.kernel_size - 1) * self.config.dilation + 1
        if self.lead is None and min(height, width) >= window:
            return True  # Whatever the padding.
        return min(self.config.output_hw(*self.op_hw(height, width))) > 0

    @property
    def clips(self) -> tuple[Activation, Activation, Activation]:
        """After expansion, depthwise and projection."""
        expand = NO_CLIP if self.expand is None else self.expand.clip
        return expand, self.depthwise.clip, self.project.clip

    @property
    def is_classic(self) -> bool:
        """Whether the op that computes them is `inverted_residual`."""
        c = self.config
        return is_classic(self.clips, self.gate is not None, c.dense, c.kernel_size, c.dilation)


def fold_layers(layers: BlockLayers) -> FoldedWeights:
    """Fold batch norm into the three convolutions (computed in float64, rounded once).

    Differentiable in every parameter, so that gradients of the folded weights reach the layers.
    """
    return _fold(layers, layers.config.dense)


def _fold(layers: BlockLayers, dense: bool) -> FoldedWeights:
    weights: dict[str, Any] = {}
    expand, depthwise, project = layers.expand, layers.depthwise, layers.project
    if expand is not None:
        weight, bias = fold_conv_norm(expand)
        weights |= {"w_expand": weight[:, :, 0, 0].t().contiguous(), "b_expand": bias}
        weights["clip_expand"] = expand.clip
    else:
        weights |= {"w_expand": None, "b_expand": None, "clip_expand": NO_CLIP}
    weight, bias = fold_conv_norm(depthwise)
    weight = weight.permute(2, 3, 1, 0)
    weights |= {"w_dw": (weight if dense else weight[:, :, 0]).contiguous()}
    weights |= {"b_dw": bias}
    weight, bias = fold_conv_norm(project)
    weights |= {"w_project": weight[:, :, 0, 0].t().contiguous(), "b_project": bias}
    gate = None if layers.gate is None else fold_gate(layers.gate)
    return FoldedWeights(**weights, clip_dw=depthwise.clip, clip_project=project.clip, gate=gate)


def fold_gate(layers: GateLayers) -> FoldedGate:
    """The weights of a squeeze-excite in the one layout, differentiable like `fold_layers`."""
    tensors: list[Tensor] = []
    for stage in (layers.squeeze, layers.excite):
        weight, bias = fold_conv_norm(stage)
        tensors += [weight.flatten(1).t().contiguous(), bias]
    return FoldedGate(*tensors, layers.squeeze.clip, layers.scale)


def fold_conv_norm(stage: ConvNorm) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the convolution that equals convolution followed by batch norm.

    y = (conv(x) + b - mean) / sqrt(var + eps) * gamma + beta.
    """
    conv, norm = stage.conv, stage.norm
    dtype = conv.weight.dtype
    weight = conv.weight.double()
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.double()
    if norm is not None:
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        weight = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
        bias = (bias - norm.running_mean.double()) * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
    return weight.to(dtype), bias.to(torch.promote_types(dtype, torch.float32))


# The tensors of a stage, in the order of the bits that say which of them it has.
_STAGE_TENSORS = (
    ("conv", "weight"),
    ("conv", "bias"),
    ("norm", "weight"),
    ("norm", "bias"),
    ("norm", "running_mean"),
    ("norm", "running_var"),
)


def flatten_layers(layers: BlockLayers) -> tuple[list[Tensor], list[int], list[float]]:
    """(tensors, present, eps): the unfolded layers that the op computes, as its plain arguments.

    `tensors` go stage by stage from the expansion on. By stage, `present` has a bit for each tensor
    it has, and `eps` the norm's eps, 0 without a norm.
    """
    tensors, present, eps = [], [], []
    for stage in layers.op_stages:
        bits = 0
        for bit, (module, name) in enumerate(_STAGE_TENSORS):
            owner = getattr(stage, module)
            tensor = None if owner is None else getattr(owner, name)
            if tensor is not None:
                tensors.append(tensor)
                bits |= 1 << bit
        present.append(bits)
        eps.append(0.0 if stage.norm is None else stage.norm.eps)
    return tensors, present, eps


def fold_flat(
    tensors: list[Tensor], present: list[int], eps: list[float]
) -> tuple[Tensor | None, ...]:
    """The ten folded tensors of what `flatten_layers` gives for a block, None for what it lacks."""
    rest = iter(tensors)
    stages: list[ConvNorm] = []
    for bits, norm_eps in zip(present, eps, strict=True):
        conv, norm = SimpleNamespace(), SimpleNamespace(eps=norm_eps)
        for bit, (module, name) in enumerate(_STAGE_TENSORS):
            owner = conv if module == "conv" else norm
            setattr(owner, name, next(rest) if bits >> bit & 1 else None)
        stages.append(ConvNorm(conv, None if norm.running_var is None else norm))
    # Of three stages or fewer none is of a gate; more are all but perhaps the expansion.
    gate = GateLayers(*stages[-2:], "sigmoid") if len(stages) > 3 else None
    *expand, depthwise, project = stages if gate is None else stages[:-2]
    first = expand[0] if expand else None
    # A dense convolution has more than one input channel.
    dense = depthwise.tensors()[0].shape[1] > 1
    weights = _fold(BlockLayers(first, depthwise, project, config=None, gate=gate), dense)
    of_gate = (None,) * 4 if weights.gate is None else weights.gate.tensors()
    return *weights.tensors(), *of_gate
