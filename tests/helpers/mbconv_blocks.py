"""Blocks of the op `mbconv` as layers of torch.nn and torchvision."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import cases
import torch
from same_answers import randomise
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from mnv2_kernels import FoldedWeights
from mnv2_kernels.block.config import (
    CURVES,
    NO_CLIP,
    RELU,
    RELU6,
    SCALES,
    Activation,
    BlockConfig,
    Scale,
)
from mnv2_kernels.block.fold import BlockLayers, ConvNorm, GateLayers, fold_layers
from mnv2_kernels.modules import fused_module
from mnv2_kernels.modules.fused_module import FusedModule
from mnv2_kernels.recognizers import Reading

ACTIVATIONS = {
    NO_CLIP: nn.Identity,
    RELU: nn.ReLU,
    RELU6: nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}
SCALING = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}


@dataclass(frozen=True)
class MBConvCase:
    """A block, the size of its input, and what follows expansion, depthwise and projection."""

    config: BlockConfig
    height: int
    width: int
    batch: int = 2
    between: tuple[Activation, Activation, Activation] = ("hardswish", "hardswish", NO_CLIP)
    squeeze: Activation = RELU
    scale: Scale = "hardsigmoid"

    @property
    def settings(self) -> dict:
        return cases.Case(self.config, self.height, self.width).settings

    def layers(self) -> "MBConv":
        """The same numbers at every call."""
        torch.manual_seed(0)
        return randomise(MBConv(self)).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, FoldedWeights]:
        """x (NCHW) and weights; biases hold numbers of the dtype, in float32 at least."""
        layers = self.layers()
        x = 2 * torch.randn(self.batch, self.config.in_channels, self.height, self.width)
        with torch.no_grad():
            weights = fold_layers(layers.block_layers())
        return x.to(dtype), in_dtype(weights, dtype)


GATED = MBConvCase(
    BlockConfig(8, 24, 8, residual=True, squeeze_channels=6), 6, 7, squeeze="silu", scale="sigmoid"
)


def in_dtype(weights: FoldedWeights, dtype: torch.dtype) -> FoldedWeights:
    """As `FoldedWeights.to`, with biases of 16 bits left in float32."""
    rounded, kept = weights.to(dtype), torch.promote_types(dtype, torch.float32)
    names = ("b_expand", "b_dw", "b_project")
    biases = {n: b.to(kept) for n in names if (b := getattr(rounded, n)) is not None}
    gate = rounded.gate
    if gate is not None:
        gate = replace(gate, b_squeeze=gate.b_squeeze.to(kept), b_excite=gate.b_excite.to(kept))
    return replace(rounded, **biases, gate=gate)


class MBConv(nn.Module):
    """The layers of a case; batch norm after the three convolutions."""

    def __init__(self, case: MBConvCase):
        super().__init__()
        self.case, c = case, case.config
        hidden = c.hidden_channels
        self.expand = None
        if c.expansion:
            self.expand = self._stage(nn.Conv2d(c.in_channels, hidden, 1, bias=False), 0)
        top, left, bottom, right = c.padding
        self.pad = nn.ZeroPad2d((left, right, top, bottom))
        sizes = (c.kernel_size, c.stride, 0, c.dilation)
        if c.dense:
            middle = nn.Conv2d(c.in_channels, hidden, *sizes, bias=False)
        else:
            middle = nn.Conv2d(hidden, hidden, *sizes, hidden, bias=False)
        self.depthwise = self._stage(middle, 1)
        self.gate = None
        if c.squeeze_channels:
            kinds = (ACTIVATIONS[case.squeeze], SCALING[case.scale])
            self.gate = SqueezeExcitation(hidden, c.squeeze_channels, *kinds)
        self.project = self._stage(nn.Conv2d(hidden, c.out_channels, 1, bias=False), 2)

    def _stage(self, conv: nn.Conv2d, number: int) -> nn.Sequential:
        after = ACTIVATIONS[self.case.between[number]]()
        return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), after)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(self.pad(y))
        y = y if self.gate is None else self.gate(y)
        y = self.project(y)
        return x + y if self.case.config.residual else y

    def block_layers(self) -> BlockLayers:
        case, gate = self.case, None
        stages = [
            None if stage is None else ConvNorm(stage[0], stage[1], after)
            for stage, after in zip(
                (self.expand, self.depthwise, self.project), case.between, strict=True
            )
        ]
        if self.gate is not None:
            squeeze = ConvNorm(self.gate.fc1, None, case.squeeze)
            gate = GateLayers(squeeze, ConvNorm(self.gate.fc2, None), case.scale)
        return BlockLayers(*stages, config=case.config, gate=gate)


# After expansion, depthwise and projection.
BETWEEN = (
    *((curve, curve, NO_CLIP) for curve in CURVES),
    *((CURVES[i], CURVES[i - 1], CURVES[i - 2]) for i in range(4)),
    (RELU6, "hardswish", RELU6),
    ("silu", NO_CLIP, NO_CLIP),
)
GATES = (
    (0, RELU, "sigmoid"),
    *product((1,), (RELU,), SCALES),
    *product((5,), (RELU, RELU6, *CURVES), SCALES),
)


def mbconv_cases() -> Iterator[MBConvCase]:
    """Every two properties of a block together in one of them."""

    def is_possible(row: dict) -> bool:
        if row["residual"] and (row["stride"] == 2 or row["padding"] != "same"):
            return False
        if row["kind"] != "dense":
            # Otherwise it is a block of the other op.
            is_mbconv = row["gate"][0] > 0 or isinstance(row["between"][1], str)
            is_mbconv = is_mbconv or row["kernel"] == 7 or row["dilation"] > 2
            fits = row["kernel"] < 7 or row["dilation"] < 4 or row["padding"] == "same"
            return is_mbconv and fits and row["kernel"] > 1
        fits = row["kernel"] > 1 or row["padding"] in ("same", (0, 0, 0, 0))
        return fits and row["gate"][0] == 0 and row["dilation"] == 1 and row["kernel"] < 7

    rows = cases.pairwise(
        {
            "kernel": (1, 3, 5, 7),
            "stride": (1, 2),
            "dilation": (1, 2, 4),
            "kind": ("expansion", "t = 1", "dense"),
            "padding": ("same", (0, 0, 1, 1), (1, 0, 2, 1), (0, 0, 0, 0)),
            "residual": (True, False),
            "between": (*BETWEEN, (RELU6, RELU6, NO_CLIP)),
            "gate": GATES,
        },
        is_possible,
    )
    for i, row in enumerate(rows):
        extent = row["dilation"] * (row["kernel"] - 1)
        squeezed, squeeze, scale = row["gate"]
        config = BlockConfig(
            in_channels=10,
            hidden_channels=10 if row["kind"] == "t = 1" else 19,
            out_channels=10 if row["residual"] else 7,
            stride=row["stride"],
            expansion=row["kind"] == "expansion",
            kernel_size=row["kernel"],
            dilation=row["dilation"],
            padding=(extent // 2,) * 4 if row["padding"] == "same" else row["padding"],
            residual=row["residual"],
            squeeze_channels=squeezed,
            dense=row["kind"] == "dense",
        )
        between = row["between"]
        if not config.expansion:
            between = (NO_CLIP, *between[1:])
        # Room for a window without padding.
        size = max(9 + i % 3, extent + 1), max(12 - i % 4, extent + 2)
        yield MBConvCase(config, *size, 1 + i % 3, between, squeeze, scale)


class FusedMBConv(FusedModule):
    """Such layers as a fused block that need not be recognised: `reads_as_written` says so."""

    def __init__(self, case: MBConvCase, backend: str | None = None):
        super().__init__()
        self.layers, self.backend = case.layers(), backend
        self._take_over(self.reading())

    def reading(self) -> Reading:
        return Reading((self.layers.block_layers(),), False)

    def plain_forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def reads_as_written(monkeypatch) -> None:
    """Take the word of a `FusedMBConv` for what it computes."""
    for name in ("read", "read_unknown"):
        monkeypatch.setattr(fused_module, name, lambda block, *args: block.reading())
