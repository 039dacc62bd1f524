"""Squeeze-excite and activations as people write them by hand, in blocks of their own."""

from foreign_blocks import conv_norm_act
from torch import Tensor, nn
from torch.nn import functional as F

from mnv2_kernels.block.config import NO_PADDING
from mnv2_kernels.block.fold import BlockLayers, fold_conv_norm, fold_layers
from mnv2_kernels.ops import reference
from mnv2_kernels.recognizers import AverageLayer, Layer


class Gated(nn.Module):
    """An inverted residual with a gate between `act` and the projection.

    `around`: of the value and the module that makes the gate, what goes on.
    """

    def __init__(self, gate, around=lambda y, gate: y * gate(y), act=nn.ReLU6, hidden=24):
        super().__init__()
        self.expand = nn.Sequential(*(conv_norm_act(8, hidden, act=act) if hidden != 8 else ()))
        self.depthwise = nn.Sequential(*conv_norm_act(hidden, hidden, 3, 1, hidden, act))
        self.gate, self.around = gate, around
        self.project = nn.Sequential(*conv_norm_act(hidden, 8, act=None))

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        return x + self.project(self.around(y, self.gate))


class Written(nn.Module):
    """Two layers of the means, by a function of y, the first and the second layer."""

    def __init__(self, gate, make=lambda i, o: nn.Conv2d(i, o, 1), channels=24, squeezed=6):
        super().__init__()
        self.first, self.second = make(channels, squeezed), make(squeezed, channels)
        self.norm = nn.BatchNorm2d(squeezed)
        self.function = gate

    def forward(self, y):
        return self.function(self, y)


class HardSigmoid(nn.Module):
    """h_sigmoid of d-li14's mobilenetv3.pytorch."""

    def __init__(self, inplace=True):
        super().__init__()
        self.relu = nn.ReLU6(inplace=inplace)

    def forward(self, x):
        return self.relu(x + 3) / 6


class HardSwish(nn.Module):
    """h_swish of the same."""

    def __init__(self, inplace=True):
        super().__init__()
        self.sigmoid = HardSigmoid(inplace=inplace)

    def forward(self, x):
        return x * self.sigmoid(x)


class SELayer(nn.Module):
    """SELayer of the same: it multiplies itself."""

    def __init__(self, channel=24, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel),
            HardSigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y


class MobileNetV3Block(nn.Module):
    """InvertedResidual of the same: squeeze-excite before or after the activation."""

    def __init__(self, se_first=True, hidden=24):
        super().__init__()
        depthwise = conv_norm_act(hidden, hidden, 3, 1, hidden, HardSwish)
        se = SELayer(hidden)
        depthwise = [*depthwise[:2], se, depthwise[2]] if se_first else [*depthwise, se]
        self.conv = nn.Sequential(
            *(conv_norm_act(8, hidden, act=HardSwish) if hidden != 8 else ()),
            *depthwise,
            *conv_norm_act(hidden, 8, act=None),
        )

    def forward(self, x):
        return x + self.conv(x)


def reference_of(layers: BlockLayers, x: Tensor) -> Tensor:
    """A block by its folded weights in plain PyTorch."""
    assert layers.pads == NO_PADDING and not layers.adds
    config = layers.config
    return reference.inverted_residual(
        x,
        fold_layers(layers),
        stride=config.stride,
        padding=config.padding,
        dilation=config.dilation,
        residual=config.residual,
    )


def computed(layer: Layer, x: Tensor) -> Tensor:
    """What one layer of a reading makes of x."""
    match layer:
        case BlockLayers():
            return reference_of(layer, x)
        case AverageLayer():
            return x.mean((2, 3))
    weight, bias = fold_conv_norm(layer.stage)
    if x.dim() == 2:
        return reference.activate(F.linear(x, weight.flatten(1), bias), layer.stage.clip)
    top, left, bottom, right = layer.padding
    x = F.pad(x, (left, right, top, bottom))
    y = F.conv2d(x, weight, bias, layer.stride, 0, layer.dilation, layer.groups)
    return reference.activate(y, layer.stage.clip)
