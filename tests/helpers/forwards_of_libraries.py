"""Blocks written as in public repositories, for `FORWARDS`; most are inverted residuals exactly."""

import numpy as np
import torch
from forwards import FORWARDS, Copied, conv_norm_act, forward, layers
from torch import nn
from torch.nn import functional as F
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

__all__ = ["FORWARDS"]


def fixed_padding(x, kernel_size, dilation):
    total = (kernel_size - 1) * dilation
    before = total // 2
    return F.pad(x, (before, total - before, before, total - before))


class DeepLab(nn.Module):
    """The block of the most copied DeepLab repositories: x is padded, its layers pad nothing."""

    def __init__(self, hidden=24, stride=1, dilation=1, flag=False):
        super().__init__()
        self.conv = nn.Sequential(
            *layers(hidden=hidden, stride=stride, padding=0, dilation=dilation)
        )
        self.kernel_size, self.dilation, self.use_res_connect = 3, dilation, flag

    def forward(self, x):
        padded = fixed_padding(x, self.kernel_size, dilation=self.dilation)
        return x + self.conv(padded) if self.use_res_connect else self.conv(padded)


forward("deeplab", is_block=True)(DeepLab)
forward("deeplab, residual", is_block=True)(lambda: DeepLab(flag=True))
forward("deeplab, no expansion", is_block=True)(lambda: DeepLab(hidden=8))
forward("deeplab, stride 2", is_block=True)(lambda: DeepLab(stride=2))
forward("deeplab, dilated", is_block=True)(lambda: DeepLab(dilation=2))


class WrittenOut(nn.Module):
    """conv1, bn1, conv2, bn2, conv3, bn3, and functions for the activations."""

    def __init__(self, stride=1, outputs=8):
        super().__init__()
        self.conv1, self.bn1 = conv_norm_act(8, 24, act=None)
        self.conv2, self.bn2 = conv_norm_act(24, 24, 3, stride, 24, act=None)
        self.conv3, self.bn3 = conv_norm_act(24, outputs, act=None)

    def forward(self, x):
        y = F.relu6(self.bn1(self.conv1(x)))
        y = F.relu6(self.bn2(self.conv2(y)))
        return self.bn3(self.conv3(y))


@forward(is_block=True)
class WrittenOutResidual(WrittenOut):
    def forward(self, x):
        out = F.relu6(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu6(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += x
        return out


@forward(is_block=True)
class OneReluForAll(WrittenOut):
    """One activation module, used twice, as in ResNets."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + identity


@forward()
class WrittenOutOtherOrder(WrittenOut):
    """The second norm and activation changed places."""

    def forward(self, x):
        y = F.relu6(self.bn1(self.conv1(x)))
        y = self.bn2(F.relu6(self.conv2(y)))
        return x + self.bn3(self.conv3(y))


@forward()
class WrittenOutOneNormTwice(WrittenOut):
    def forward(self, x):
        y = F.relu6(self.bn1(self.conv1(x)))
        y = F.relu6(self.bn1(self.conv2(y)))
        return x + self.bn3(self.conv3(y))


forward("written out", is_block=True)(WrittenOut)
forward("written out, stride 2", is_block=True)(lambda: WrittenOut(2, 16))


@forward(is_block=True)
class PytorchCifar(WrittenOut):
    """kuangliu's Block where nothing changes: its shortcut is an empty Sequential."""

    def __init__(self, stride=1, outputs=8):
        super().__init__(stride, outputs)
        self.stride = stride
        self.shortcut = nn.Sequential()
        if stride == 1 and outputs != 8:
            self.shortcut = nn.Sequential(*conv_norm_act(8, outputs, act=None))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


forward("pytorch cifar, stride 2", is_block=True)(lambda: PytorchCifar(2, 16))
forward("pytorch cifar, convolved shortcut")(lambda: PytorchCifar(1, 16))


def with_flag(flag):
    def build():
        block = Copied()
        block.use_res_connect = flag
        return block

    return build


forward("flag 1", is_block=True)(with_flag(1))
forward("flag np.bool_", is_block=True)(with_flag(np.bool_(True)))
forward("flag np.False_", is_block=True)(with_flag(np.bool_(False)))
forward("flag 0", is_block=True)(with_flag(0))


@forward(is_block=True)
class EqualShapes(Copied):
    def forward(self, x):
        y = self.conv(x)
        return x + y if self.use_res_connect and x.shape == y.shape else y


@forward("shapes that differ", is_block=True)
class ShapesThatDiffer(EqualShapes):
    settings = {"stride": 2, "outputs": 16}


@forward("shapes that differ by channels", is_block=True)
class OtherChannels(EqualShapes):
    settings = {"outputs": 16}


@forward("size that may be equal", shape=(2, 8, 1, 1))
class SizeThatMayBeEqual(EqualShapes):
    """At stride 2 one pixel stays one pixel: there it has a residual, elsewhere not."""

    settings = {"stride": 2}


def with_leftovers(block):
    for module in block.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    return block


forward("leftover buffers", is_block=True)(lambda: with_leftovers(Copied()))
forward("leftover buffers, torchvision", is_block=True)(
    lambda: with_leftovers(TorchvisionBlock(8, 8, 1, 3))
)


class Identity(nn.Module):
    """IdentityLayer of ProxylessNAS: its own class."""

    def forward(self, x):
        return x


class MobileInvertedConv(nn.Module):
    """MBInvertedConvLayer / MBConvLayer of ProxylessNAS, once-for-all and MCUNet."""

    def __init__(self, stride=1, outputs=8, expands=True):
        super().__init__()
        hidden = 24 if expands else 8
        names = ("conv", "bn", "act")
        stages = {
            "inverted_bottleneck": conv_norm_act(8, hidden) if expands else None,
            "depth_conv": conv_norm_act(hidden, hidden, 3, stride, hidden),
            "point_linear": conv_norm_act(hidden, outputs, act=None),
        }
        for name, stage in stages.items():
            unit = stage and nn.Sequential()
            for child, layer in zip(names, stage or (), strict=False):
                unit.add_module(child, layer)
            setattr(self, name, unit)

    def forward(self, x):
        if self.inverted_bottleneck:
            x = self.inverted_bottleneck(x)
        x = self.depth_conv(x)
        return self.point_linear(x)


class ProxylessBlock(nn.Module):
    """MobileInvertedResidualBlock of the same."""

    def __init__(self, mobile_inverted_conv, shortcut):
        super().__init__()
        self.mobile_inverted_conv, self.shortcut = mobile_inverted_conv, shortcut

    def forward(self, x):
        if self.mobile_inverted_conv is None:
            return x
        if self.shortcut is None:
            return self.mobile_inverted_conv(x)
        return self.mobile_inverted_conv(x) + self.shortcut(x)


forward("proxyless", is_block=True)(lambda: ProxylessBlock(MobileInvertedConv(), Identity()))
forward("proxyless, stride 2", is_block=True)(
    lambda: ProxylessBlock(MobileInvertedConv(2, 16), None)
)
forward("proxyless, no expansion", is_block=True)(
    lambda: ProxylessBlock(MobileInvertedConv(expands=False), Identity())
)
forward("proxyless, convolved shortcut")(
    lambda: ProxylessBlock(MobileInvertedConv(1, 16), nn.Conv2d(8, 16, 1))
)


class OldTimm(nn.Module):
    """InvertedResidual of timm 0.4: act1, act2, has_residual, drop_path_rate."""

    def __init__(self, drop_path_rate=0.0, scales=False):
        super().__init__()
        self.has_residual, self.drop_path_rate, self.scales = True, drop_path_rate, scales
        self.conv_pw, self.bn1, self.act1 = conv_norm_act(8, 24)
        self.conv_dw, self.bn2, self.act2 = conv_norm_act(24, 24, 3, 1, 24)
        self.se = None
        self.conv_pwl, self.bn3 = conv_norm_act(24, 8, act=None)

    def forward(self, x):
        residual = x
        x = self.act1(self.bn1(self.conv_pw(x)))
        x = self.act2(self.bn2(self.conv_dw(x)))
        if self.se is not None:
            x = self.se(x)
        x = self.bn3(self.conv_pwl(x))
        if self.has_residual:
            if self.drop_path_rate > 0.0:
                x = self.drop_path(x)
            x += residual
        return x

    def drop_path(self, x):
        if not self.training and not self.scales:
            return x
        keep = 1 - self.drop_path_rate
        mask = torch.rand(x.shape[0], 1, 1, 1).add(keep).floor().to(x)
        return x / keep * mask


forward("old timm", is_block=True)(OldTimm)
forward("old timm, drop path")(lambda: OldTimm(0.4))
forward("old timm, drop path always")(lambda: OldTimm(0.4, True))


class FastScnn(nn.Module):
    """LinearBottleneck of Fast-SCNN."""

    def __init__(self, stride=1):
        super().__init__()
        expand = conv_norm_act(8, 24, act=nn.ReLU)
        depthwise = conv_norm_act(24, 24, 3, stride, 24, nn.ReLU)
        self.use_shortcut = stride == 1
        self.block = nn.Sequential(
            nn.Sequential(*expand), nn.Sequential(*depthwise), *conv_norm_act(24, 8, act=None)
        )

    def forward(self, x):
        out = self.block(x)
        if self.use_shortcut:
            out = x + out
        return out


forward("fast scnn", is_block=True)(FastScnn)
forward("fast scnn, stride 2", is_block=True)(lambda: FastScnn(2))


class ConvBlock(nn.Module):
    """Conv_block of MobileFaceNet; without an activation its Linear_block."""

    def __init__(self, conv, bn, act=None):
        super().__init__()
        self.conv, self.bn = conv, bn
        if act is not None:
            self.prelu = act

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.prelu(x) if hasattr(self, "prelu") else x


class MobileFaceNet(nn.Module):
    """Depth_Wise of MobileFaceNet."""

    def __init__(self, act):
        super().__init__()
        self.conv = ConvBlock(*conv_norm_act(8, 24, act=act))
        self.conv_dw = ConvBlock(*conv_norm_act(24, 24, 3, 1, 24, act))
        self.project = ConvBlock(*conv_norm_act(24, 8, act=None))
        self.residual = True

    def forward(self, x):
        if self.residual:
            short_cut = x
        x = self.project(self.conv_dw(self.conv(x)))
        return short_cut + x if self.residual else x


forward("mobilefacenet", is_block=True)(lambda: MobileFaceNet(nn.ReLU))
forward("mobilefacenet, prelu")(lambda: MobileFaceNet(lambda: nn.PReLU(24)))


@forward("kernelbench", is_block=True)
class KernelBench(nn.Module):
    def __init__(self):
        super().__init__()
        self.use_residual = True
        self.expand_conv = nn.Sequential(*conv_norm_act(8, 24))
        self.depthwise_conv = nn.Sequential(*conv_norm_act(24, 24, 3, 1, 24))
        self.project_conv = nn.Sequential(*conv_norm_act(24, 8, act=None))

    def forward(self, x):
        identity = x
        if hasattr(self, "expand_conv"):
            x = self.expand_conv(x)
        x = self.project_conv(self.depthwise_conv(x))
        if self.use_residual:
            x += identity
        return x


@forward("kernelbench, cut short")
class KernelBenchCutShort(KernelBench):
    def forward(self, x):
        return self.depthwise_conv(self.expand_conv(x))


@forward("torchvision, scaled by a subclass")
class ScaledTorchvision(TorchvisionBlock):
    def __init__(self):
        super().__init__(8, 8, 1, 3)

    def forward(self, x):
        return 0.5 * super().forward(x)


@forward("torchvision, padded by a subclass")
class PaddedTorchvision(ScaledTorchvision):
    def forward(self, x):
        return TorchvisionBlock.forward(self, F.pad(x, (1, 1, 1, 1)))


class Changed(Copied):
    """Other layers, the same forward."""

    def __init__(self, change, **settings):
        self.settings = settings
        super().__init__()
        change(self.conv)


def put(index, make):
    return lambda conv: conv.__setitem__(index, make())


forward("without norms", is_block=True)(lambda: Changed(lambda conv: None, norm=None))
forward("biases and norms", is_block=True)(
    lambda: Changed(put(0, lambda: nn.Conv2d(8, 24, 1, bias=True)))
)
forward("grouped expansion")(lambda: Changed(put(0, lambda: nn.Conv2d(8, 24, 1, groups=4))))
forward("grouped projection")(lambda: Changed(put(6, lambda: nn.Conv2d(24, 8, 1, groups=2))))
forward("one norm in training mode")(
    lambda: Changed(put(1, lambda: nn.BatchNorm2d(24, track_running_stats=False)))
)
