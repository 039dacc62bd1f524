"""Networks for the tests of plans, with batch norms that bring both ends of every clip to work."""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import timm
import torch
import torchvision
from cases import Expected
from foreign_blocks import Flat, conv_norm_act, flow
from hypothesis import strategies as st
from torch import Tensor, nn

import mnv2_kernels as mk
from benchmarks.harness import randomise_norms
from mnv2_kernels.network.plan import Plan
from mnv2_kernels.network.program import Block
from mnv2_kernels.profiling.variants import plain

WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.4)


def _without_bias() -> nn.Module:
    model = mk.mobilenet_v2(0.35)
    model.classifier[1] = nn.Linear(model.last_channel, 101, bias=False)
    return model


def _mean_alone() -> nn.Module:
    """A stem, three blocks, the mean of their result and a classifier."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*mk.mobilenet_v2(0.5).features[:4], *head)


def _short() -> nn.Module:
    """Every kind of step, and few of them."""
    head = *conv_norm_act(16, 70), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(70, 101)
    return nn.Sequential(*mk.mobilenet_v2(0.35).features[:5], *head)


def _residuals() -> nn.Module:
    """Blocks of one shape after a stem: all of them overwrite their input."""
    blocks = (mk.InvertedResidual(16, 16, expand_ratio=3, kernel_size=k) for k in (5, 3, 3, 5))
    return nn.Sequential(nn.Sequential(*conv_norm_act(3, 16, 3, 2)), *blocks)


def _flat() -> nn.Module:
    """Depthwise blocks without modules of their own, with and without expansion."""
    layers = [
        *conv_norm_act(3, 8, 3, 2),
        *conv_norm_act(8, 8, 3, 1, groups=8, act=nn.ReLU),
        *conv_norm_act(8, 12, 1, act=None),
        *conv_norm_act(12, 40, 1),
        nn.ZeroPad2d((1, 2, 2, 1)),
        *conv_norm_act(40, 40, 5, 2, groups=40, padding=0),
        *conv_norm_act(40, 20, 1),
        *conv_norm_act(20, 20, 3, 1, groups=20),
        *conv_norm_act(20, 9, 1, act=nn.ReLU),
        *conv_norm_act(9, 30, 1),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(30, 7))


def _pointwise() -> nn.Module:
    """1x1 convolutions between blocks and at the end: more pixels, and fewer, than a panel has."""
    first = mk.mobilenet_v2(0.5).features[0]
    return nn.Sequential(
        first,
        nn.Sequential(*conv_norm_act(16, 70, 1)),
        mk.InvertedResidual(70, 16, stride=2),
        mk.InvertedResidual(16, 16, stride=2),
        *conv_norm_act(16, 21, 1, act=None),
    )


_timm = partial(partial, timm.create_model)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{f"ours-{width:g}": partial(mk.mobilenet_v2, width, 100) for width in WIDTHS},
    "ours-tf": partial(mk.mobilenet_v2, 0.35, 1001, tf_padding=True),
    "ours-one-class": partial(mk.mobilenet_v2, 0.35, 1),
    "ours-without-bias": _without_bias,
    "mean-alone": _mean_alone,
    "short": _short,
    "pointwise": _pointwise,
    "residuals": _residuals,
    "flat": _flat,
    "block": partial(mk.InvertedResidual, 3, 17, stride=2, kernel_size=5),
    "block-residual": partial(mk.InvertedResidual, 3, 3),
    **{
        f"features-{count}": lambda count=count: mk.mobilenet_v2().features[:count]
        for count in (1, 2, 3, 8, 18)
    },
    "torchvision-0.75": partial(torchvision.models.mobilenet_v2, width_mult=0.75),
    "torchvision-mnasnet": torchvision.models.mnasnet0_5,
    "timm-tf-lite0": _timm("tf_efficientnet_lite0"),
    "timm-0.5": _timm("mobilenetv2_050"),
    "timm-1.4": _timm("mobilenetv2_140", num_classes=1001),
    "timm-without-classes": _timm("mobilenetv2_050", num_classes=0),
    "timm-lite0": _timm("efficientnet_lite0"),
    "timm-mobilenetv1": _timm("mobilenetv1_100"),
    "timm-mnasnet": _timm("mnasnet_100"),
    "timm-spnasnet": _timm("spnasnet_100"),
}


@cache
def network(name: str) -> nn.Module:
    """The network in evaluation mode; the same for every test, which must not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise_norms(NETWORKS[name](), torch.randn(4, 3, 64, 64))


def image(*shape: int) -> Tensor:
    """The same random x for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def expect(model: nn.Module, x: Tensor) -> Expected:
    """What a plan of the model must give for x, by the layers one by one in float64."""
    layers = plain(model)
    eager = layers(x)
    truth = layers.double()(x.double())
    error = (eager.double() - truth).abs()
    return Expected(truth, x.dtype, error.max().item(), error.mean().item())


def overwriting(plan: Plan) -> list[int]:
    """Numbers of the steps whose result is in the place of their input."""
    found = []
    for number, (before, step) in enumerate(pairwise(plan.steps), 1):
        if before.streams or step.streams or number + 1 == len(plan.steps):
            continue
        layer = step.layer
        if isinstance(layer, Block) and layer.config.residual and before.offset == step.offset:
            found.append(number)
    return found


def features(plan: Plan) -> Counter:
    """What occurs in a plan, for tests that count what they have covered."""
    steps = plan.steps
    blocks = [step.layer.config for step in steps if isinstance(step.layer, Block)]
    return Counter(
        {
            "streams": sum(step.streams for step in steps),
            "streams thrice": sum(
                a.streams and b.streams and c.streams
                for a, b, c in zip(steps, steps[1:], steps[2:], strict=False)
            ),
            "overwrites": len(overwriting(plan)),
            "dilated": sum(c.dilation == 2 for c in blocks),
            "asymmetric": sum(c.padding[:2] != c.padding[2:] for c in blocks),
            "without expansion": sum(not c.expansion for c in blocks),
        }
    )


@st.composite
def _blocks(draw, channels: int) -> tuple[nn.Module, int]:
    """A block and how many channels it makes."""
    out_channels = channels if draw(st.booleans()) else draw(st.integers(1, 24))
    stride, kernel = draw(st.sampled_from((1, 1, 2))), draw(st.sampled_from((3, 5)))
    ratio = draw(st.integers(1, 6))
    if draw(st.booleans()):
        dilation = draw(st.sampled_from((1, 2)))
        extent = dilation * (kernel - 1)
        same = extent // 2
        padding = draw(st.sampled_from((same, same, 0, extent)))
        residual = stride == 1 and channels == out_channels and padding == same
        act = draw(st.sampled_from((nn.ReLU6, nn.ReLU, None)))
        layers = flow(
            channels,
            ratio * channels,
            out_channels,
            stride,
            kernel,
            act,
            dilation=dilation,
            padding=padding,
        )
        return Flat(layers, residual), out_channels
    before, beside = draw(st.tuples(*[st.integers(0, kernel - 1)] * 2))
    padding = (before, beside, kernel - 1 - before, kernel - 1 - beside)
    block = mk.InvertedResidual(
        channels,
        out_channels,
        stride=stride,
        expand_ratio=ratio,
        kernel_size=kernel,
        padding=padding,
    )
    return block, out_channels


@st.composite
def chains(draw) -> tuple[nn.Module, Tensor]:
    """A random network in evaluation mode, and three images for it."""
    torch.manual_seed(draw(st.integers(0, 999)))
    first = channels = draw(st.integers(1, 12))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        made = draw(st.integers(1, 24))
        padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
        layers = [nn.ZeroPad2d(padding), *conv_norm_act(channels, made, 3, 2, padding=0)]
        channels = made
    for _ in range(draw(st.integers(1, 6))):
        block, channels = draw(_blocks(channels))
        layers.append(block)
    if draw(st.booleans()):
        made = draw(st.sampled_from((None, 7, 70)))
        layers += conv_norm_act(channels, made) if made else []
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        if draw(st.booleans()):
            layers.append(nn.Linear(made or channels, draw(st.integers(1, 9))))
    return nn.Sequential(*layers), torch.randn(3, first, height, width)


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with norms that fit x, none of which magnifies rounding errors."""
    randomise_norms(model, torch.randn(4, *x.shape[1:]))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.clamp_(min=0.1)
    return model


def why_bits_differ(plan: Plan, x: Tensor, set_threads, batches, counts) -> str | None:
    """None where every image of x has the bits that it has alone, in one thread."""
    set_threads(1)
    alone = torch.cat([plan(x[i : i + 1]) for i in range(len(x))])
    for threads in counts:
        set_threads(threads)
        for batch in batches:
            for first in {0, len(x) - batch}:
                if not torch.equal(plan(x[first : first + batch]), alone[first : first + batch]):
                    return f"{threads} threads, images {first} to {first + batch}"
    return None
