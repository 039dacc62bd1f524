"""Modules with the children of an inverted residual, whose forwards do more, or less, or just it.

`FORWARDS` has them by name; the blocks of libraries are in `forwards_of_libraries`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Forward:
    """How to build a module and call it.

    arguments: x -> (args, kwargs). is_block: it is an inverted residual for x, exactly.
    in_float64: it can be run in float64, for the truth. has_gradients: PyTorch gives some.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[[Tensor], tuple[tuple, dict]]
    shape: tuple[int, ...]
    is_block: bool
    in_float64: bool
    has_gradients: bool


FORWARDS: dict[str, Forward] = {}


def forward(
    name=None,
    arguments=lambda x: ((x,), {}),
    shape=(2, 8, 9, 7),
    is_block=False,
    in_float64=True,
    has_gradients=True,
):
    """Enter a class, or a function that makes a module, into FORWARDS under its name in words."""

    def enter(build):
        words = re.sub(r"(?<=.)(?=[A-Z])", " ", build.__name__).lower()
        case = Forward(build, arguments, shape, is_block, in_float64, has_gradients)
        FORWARDS[name or words] = case
        return build

    return enter


def conv_norm_act(
    inputs, outputs, kernel=1, stride=1, groups=1, act=nn.ReLU6, norm=nn.BatchNorm2d, **settings
) -> list[nn.Module]:
    settings = {"padding": kernel // 2, "bias": norm is None} | settings
    conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, **settings)
    return [conv, *([norm(outputs)] if norm else []), *([act()] if act else [])]


def layers(inputs=8, hidden=24, outputs=8, stride=1, act=nn.ReLU6, norm=nn.BatchNorm2d, **dw):
    """The layers of one block in order; without the first three where hidden == inputs."""
    expand = conv_norm_act(inputs, hidden, act=act, norm=norm) if hidden != inputs else []
    return [
        *expand,
        *conv_norm_act(hidden, hidden, 3, stride, hidden, act, norm, **dw),
        *conv_norm_act(hidden, outputs, act=None, norm=norm),
    ]


class Copied(nn.Module):
    """The children of the most copied MobileNetV2: `conv` and a flag."""

    flag = True
    settings: dict = {}

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(*layers(**self.settings))
        self.use_res_connect = self.flag

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


def of_result(name, change, **options):
    """Enter a block whose result is `change(self, x, self.conv(x))`."""

    class OfResult(Copied):
        def forward(self, x):
            return change(self, x, self.conv(x))

    OfResult.settings = options.pop("settings", {})
    forward(name, **options)(OfResult)


def of_input(name, change, **options):
    """Enter a block that computes `x + self.conv(change(self, x))` where the shapes are equal."""

    class OfInput(Copied):
        def forward(self, x):
            y = self.conv(change(self, x))
            return x + y if self.use_res_connect else y

    OfInput.settings = options.pop("settings", {})
    OfInput.flag = options.pop("flag", True)
    forward(name, **options)(OfInput)


STRIDED = {"stride": 2}
UNPADDED = {"padding": 0}
WIDER = {"outputs": 16}

of_result("scaled residual", lambda m, x, y: x + 0.5 * y)
of_result("scaled shortcut", lambda m, x, y: 0.5 * x + y)
of_result("added with alpha", lambda m, x, y: torch.add(x, y, alpha=2))
of_result("subtracted", lambda m, x, y: y - x)
of_result("multiplied", lambda m, x, y: x * y)
of_result("added twice", lambda m, x, y: x + y + x)
of_result("clip after the sum", lambda m, x, y: F.relu6(x + y))
of_result("clip before the sum", lambda m, x, y: x + F.relu(y))
of_result("pooled shortcut", lambda m, x, y: y + F.avg_pool2d(x, 2, 2, 0, True), settings=STRIDED)
of_result("sliced shortcut", lambda m, x, y: y + x[:, :, ::2, ::2], settings=STRIDED)
of_result("padded channels", lambda m, x, y: y + F.pad(x, (0, 0, 0, 0, 0, 8)), settings=WIDER)
of_result("concatenated", lambda m, x, y: torch.cat([x, y], 1))
of_result("shuffled", lambda m, x, y: F.channel_shuffle(x + y, 2))
of_result("transposed", lambda m, x, y: (x + y).transpose(2, 3))
of_result("interpolated", lambda m, x, y: F.interpolate(x + y, scale_factor=2))
of_result("gated", lambda m, x, y: x + y * torch.sigmoid(y.mean((2, 3), keepdim=True)))
of_result("dropout by mode", lambda m, x, y: x + F.dropout(y, 0.3, training=m.training))
of_result("dropout always", lambda m, x, y: x + F.dropout(y.contiguous(), 0.3), in_float64=False)
of_result("random scale", lambda m, x, y: x + y * torch.rand(()).item())
of_result("drops paths", lambda m, x, y: x + (y * 0 if m.training and torch.rand(()) < 0.5 else y))
of_result("a tuple", lambda m, x, y: (x + y, y))
of_result("a dict", lambda m, x, y: {"out": x + y, "low": x})
of_result("detached shortcut", lambda m, x, y: x.detach() + y)
of_result("detached", lambda m, x, y: x + y.detach())
of_result("by batch size", lambda m, x, y: x + y if x.shape[0] == 1 else y)
of_result("by size", lambda m, x, y: x + y if x.shape[2] > 100 else y)
of_result("by gradient", lambda m, x, y: x + y if x.requires_grad else x - y)
of_result("by grad mode", lambda m, x, y: x + y if torch.is_grad_enabled() else x - y)
of_result("by mode", lambda m, x, y: x + y if m.training else y)
of_result("by values", lambda m, x, y: x + y if x.mean() > 9 else y)
of_result("in place on x", lambda m, x, y: x.add_(y), has_gradients=False)
of_result("twice the same block", lambda m, x, y: x + m.conv(y))
of_result("view of the result", lambda m, x, y: (x + y).flatten(2))
of_result("part of the batch", lambda m, x, y: (x + y)[:1])
of_input("pads with ones", lambda m, x: F.pad(x, (1, 1, 1, 1), value=1.0), settings=UNPADDED)
of_input("reflects", lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), settings=UNPADDED)
of_input("crops", lambda m, x: F.pad(x, (-1, -1, -1, -1)), flag=False)
of_input("pads too much", lambda m, x: F.pad(x, (2, 2, 2, 2)), flag=False)
of_input("relu before", lambda m, x: F.relu(x))
of_input("relu of x in place", lambda m, x: F.relu6(x, inplace=True))
of_input("scaled in place", lambda m, x: x.mul_(2))
of_input("double input", lambda m, x: x.to(torch.float64).to(torch.float32), in_float64=False)
of_input("float input", lambda m, x: x.float(), in_float64=False)
of_input("flipped", lambda m, x: x.flip(3))


@forward("second tensor", lambda x: ((x, x.flip(1)), {}))
class SecondTensor(Copied):
    def forward(self, x, other):
        return other + self.conv(x)


@forward("optional tensor, given", lambda x: ((x,), {"skip": x.flip(1)}))
@forward("optional tensor, given by place", lambda x: ((x, x.flip(1)), {}))
@forward("optional tensor, left out")
class OptionalTensor(Copied):
    def forward(self, x, skip=None):
        y = x + self.conv(x)
        return y if skip is None else y + skip


@forward("number of times", lambda x: ((x,), {"times": 3}))
class NumberOfTimes(Copied):
    def forward(self, x, times: int = 1):
        for _ in range(times):
            x = x + self.conv(x)
        return x


SHORTCUT_IS_USED = False


@forward()
class ByGlobal(Copied):
    def forward(self, x):
        return x + self.conv(x) if SHORTCUT_IS_USED else self.conv(x)


@forward()
class ByAttribute(Copied):
    def __init__(self):
        super().__init__()
        self.mode = "subtract"

    def forward(self, x):
        y = self.conv(x)
        if self.mode == "subtract":
            return x - y
        return x + y


@forward()
class CountsCalls(Copied):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.conv(x) if self.calls % 2 else self.conv(x)


@forward()
class RemembersShapes(Copied):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return x + self.conv(x)


@forward()
class Prints(Copied):
    def forward(self, x):
        print("in", tuple(x.shape))
        return x + self.conv(x)


@forward()
class ConvolvedShortcut(Copied):
    settings = {"outputs": 16}

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        return self.shortcut(x) + self.conv(x)


@forward()
class Standardised(Copied):
    """The first weight is standardised before it is used."""

    def forward(self, x):
        weight = self.conv[0].weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) * 2
        return x + self.conv[1:](F.conv2d(x, weight))


class HalvedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


@forward()
class OwnGradient(Copied):
    def forward(self, x):
        return x + self.conv(HalvedGradient.apply(x))


@forward()
class WithoutGradient(Copied):
    def forward(self, x):
        with torch.no_grad():
            y = self.conv(x)
        return x + y


@forward()
class UnderAutocast(Copied):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.conv(x)
        return x + y.to(x.dtype)


@forward()
class Checkpointed(Copied):
    def forward(self, x):
        return x + checkpoint(self.conv, x, use_reentrant=False)


@forward()
class LayerScale(Copied):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.1, 1, 8).view(8, 1, 1))

    def forward(self, x):
        return x + self.gamma * self.conv(x)


@forward()
class LeavesOutAnActivation(Copied):
    def forward(self, x):
        return x + self.conv[3:](self.conv[:2](x))


@forward()
class NormsLast(Copied):
    """Norms after the activations, by the order of the forward alone."""

    def forward(self, x):
        conv1, bn1, act1, conv2, bn2, act2, conv3, bn3 = self.conv
        y = bn2(act2(conv2(bn1(act1(conv1(x))))))
        return x + bn3(conv3(y))


@forward()
class NormOfTheBatch(Copied):
    """Its second norm uses the statistics of the batch in evaluation mode too."""

    def forward(self, x):
        norm = self.conv[4]
        y = F.batch_norm(
            self.conv[:4](x), None, None, norm.weight, norm.bias, training=True, eps=norm.eps
        )
        return x + self.conv[5:](y)


@forward()
class UsesTheHidden(Copied):
    def forward(self, x):
        hidden = self.conv[:3](x)
        return x + self.conv[3:](hidden) + hidden.mean()


@forward()
class KeepsTheHidden(Copied):
    def forward(self, x):
        hidden = self.conv[:3](x)
        self.hidden = hidden.detach()
        return x + self.conv[3:](hidden)
