"""The vocabulary: what an inverted residual block is, and the 17 blocks of MobileNetV2.

Everything that is arithmetic on sizes lives here (MobileNetV2 paper, arXiv 1801.04381, Table 2);
this module needs neither torch nor a compiler.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

Clip = tuple[float, float]
# x * relu6(x + 3) / 6; x * sigmoid(x); x * the normal distribution's integral up to x, and the
# same by tanh, as PyTorch computes it.
Curve = Literal["hardswish", "silu", "gelu", "gelu_tanh"]
CURVES: tuple[Curve, ...] = get_args(Curve)
# What follows a layer.
Activation = Clip | Curve
# What a squeeze-excite multiplies by: of a number x, 1 / (1 + exp(-x)), or relu6(x + 3) / 6.
Scale = Literal["sigmoid", "hardsigmoid"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Padding = tuple[int, int, int, int]

# Rows (and columns) from the first tap of a depthwise window to the last, at most: 5 taps 36 apart.
MAX_EXTENT = 144

NO_PADDING: Padding = (0, 0, 0, 0)
NO_CLIP: Clip = (-inf, inf)
RELU: Clip = (0.0, inf)
RELU6: Clip = (0.0, 6.0)


def curve_and_clip(activation: Activation) -> tuple[int, Clip]:
    """The number of a curve in the ops, 0 for a clip; and the clip, which no curve has."""
    if isinstance(activation, str):
        return 1 + CURVES.index(activation), NO_CLIP
    return 0, activation


def is_classic(
    clips: tuple[Activation, ...], gated: bool, dense: bool, kernel_size: int, dilation: int
) -> bool:
    """Whether a block is one of MobileNetV2, which the op `inverted_residual` takes: clips alone
    between its layers, and a depthwise of a small window. Every other one is for the op `mbconv`.
    """
    only_clips = not gated and not any(isinstance(clip, str) for clip in clips)
    return only_clips and not dense and kernel_size != 7 and dilation <= 2


# (expand_ratio t, out_channels c, repeats n, stride s of the first repeat), paper Table 2.
MOBILENET_V2_SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
LAST_CHANNELS = 1280


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round a channel count to a multiple of `divisor`, never down by more than 10 %."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def same_padding(kernel_size: int, dilation: int = 1) -> Padding:
    """Symmetric padding (top, left, bottom, right) that keeps the size at stride 1."""
    pad = dilation * (kernel_size - 1) // 2
    return (pad, pad, pad, pad)


def output_size(
    size: int, kernel_size: int, stride: int, pad_before: int, pad_after: int, dilation: int = 1
) -> int:
    """Rows (or columns) that a convolution makes of `size` rows (or columns)."""
    return (size + pad_before + pad_after - dilation * (kernel_size - 1) - 1) // stride + 1


@dataclass(frozen=True)
class BlockConfig:
    """One inverted residual: expansion, depthwise, projection and, where it applies, a residual.

    `padding` is (top, left, bottom, right). `residual` is independent of the shapes because
    models exist that leave it out; it needs stride 1 and equal input and output sizes. A block with
    `squeeze_channels` has a squeeze-excite of that many channels before the projection. A `dense`
    block has one convolution of all channels in the place of expansion and depthwise: FusedMBConv
    of EfficientNetV2 (arXiv 2104.00298), and with kernel size 1 the feed-forward block of
    MobileNetV4 (arXiv 2404.10518).
    """

    in_channels: int
    hidden_channels: int
    out_channels: int
    stride: int = 1
    expansion: bool = True
    kernel_size: int = 3
    dilation: int = 1
    padding: Padding = (1, 1, 1, 1)
    residual: bool = False
    squeeze_channels: int = 0
    dense: bool = False

    def output_hw(self, height: int, width: int) -> tuple[int, int]:
        """(H_out, W_out) of an input of height x width."""
        top, left, bottom, right = self.padding
        k, s, d = self.kernel_size, self.stride, self.dilation
        return output_size(height, k, s, top, bottom, d), output_size(width, k, s, left, right, d)

    @property
    def name(self) -> str:
        """A short readable id: `24x144x24-s1-k3`, `24x72x40-s2-k5-se24`, `24x96x48-s2-k3-dense`."""
        channels = f"{self.in_channels}x{self.hidden_channels}x{self.out_channels}"
        gate = f"-se{self.squeeze_channels}" if self.squeeze_channels else ""
        dense = "-dense" if self.dense else ""
        return f"{channels}-s{self.stride}-k{self.kernel_size}{gate}{dense}"


def inverted_residual_config(
    in_channels: int, out_channels: int, stride: int, expand_ratio: float, kernel_size: int = 3
) -> BlockConfig:
    """The paper's block: no expansion at t = 1, residual iff stride is 1 and channels agree."""
    return BlockConfig(
        in_channels=in_channels,
        hidden_channels=round(in_channels * expand_ratio),
        out_channels=out_channels,
        stride=stride,
        expansion=expand_ratio != 1,
        kernel_size=kernel_size,
        padding=same_padding(kernel_size),
        residual=stride == 1 and in_channels == out_channels,
    )


def mobilenet_v2_blocks(width_mult: float = 1.0) -> Iterator[BlockConfig]:
    """The 17 blocks of MobileNetV2 in order (Table 2), at a width multiplier."""
    in_channels = make_divisible(STEM_CHANNELS * width_mult)
    for expand_ratio, channels, repeats, first_stride in MOBILENET_V2_SETTINGS:
        out_channels = make_divisible(channels * width_mult)
        for i in range(repeats):
            stride = first_stride if i == 0 else 1
            yield inverted_residual_config(in_channels, out_channels, stride, expand_ratio)
            in_channels = out_channels


def mobilenet_v2_block_inputs(
    width_mult: float = 1.0, resolution: int = 224
) -> Iterator[tuple[BlockConfig, int]]:
    """(block, height and width of its input) for the 17 blocks of a square image."""
    size = output_size(resolution, 3, 2, 1, 1)
    for block in mobilenet_v2_blocks(width_mult):
        yield block, size
        size, _ = block.output_hw(size, size)
