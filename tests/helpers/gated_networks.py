"""Networks of blocks with squeeze-excite and curves, whose gates say something."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cache, partial

import timm
import torch
import torchvision_first  # noqa: F401
from cases import Expected
from torch import Tensor, nn
from torchvision import models

import mnv2_kernels as mk
from mnv2_kernels.profiling.variants import fold_around_blocks, plain

_timm = partial(partial, timm.create_model)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_small": models.mobilenet_v3_small,
    "mobilenet_v3_large": models.mobilenet_v3_large,
    "efficientnet_b0": models.efficientnet_b0,
    "lcnet_050": _timm("lcnet_050"),
    "tinynet_e": _timm("tinynet_e"),
    "mnasnet_small": _timm("mnasnet_small"),
}


def gate_convolutions(model: nn.Module, x: Tensor) -> list[nn.Conv2d]:
    """Those whose input is one pixel, as of a squeeze-excite, in the order of a call."""
    found, hooks = [], []

    def look(module, args, _):
        if args[0].shape[2:] == (1, 1):
            found.append(module)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(look))
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """In evaluation mode, with gates all over between 0 and 1 that depend on the image."""
    x = torch.randn(4, 3, 64, 64)
    for conv in gate_convolutions(model, x):
        conv.weight.mul_(3)
        if conv.bias is not None:
            conv.bias.normal_()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.5)
    model.train()(x)
    for norm in norms:
        # Otherwise rounding errors grow from block to block.
        norm.running_var.clamp_(min=0.3 * norm.running_var.median().item())
    return model.eval()


@cache
def network(name: str) -> nn.Module:
    """The same for every test, which must not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lively(NETWORKS[name]())


def judged(truth: Tensor, ways: Iterable[Tensor], dtype: torch.dtype) -> Expected:
    """What `cases.why_wrong` needs, for errors of twice those of the worst of a few ways.

    In networks of random weights errors grow from block to block: one way of PyTorch's own has up
    to 7 times the largest error of another, so of the largest one twice as much may be.
    """
    errors = [(y.double() - truth).abs() for y in ways]
    worst, mean = (max(e.max() for e in errors), max(e.mean() for e in errors))
    return Expected(truth, dtype, 2 * worst.item(), 4 / 3 * mean.item())


@torch.no_grad()
def expect(model: nn.Module, x: Tensor) -> Expected:
    """By the layers in float64, and in x's dtype: as they are, channels last, norms folded."""
    layers = plain(model)
    nhwc = deepcopy(layers).to(x.dtype, memory_format=torch.channels_last)
    ways = [layers.to(x.dtype)(x), nhwc(x.contiguous(memory_format=torch.channels_last))]
    if x.dtype == torch.float32:
        ways.append(fold_around_blocks(deepcopy(layers))(x))
    return judged(plain(model).double()(x.double()), ways, x.dtype)


def three_layers_at_the_end() -> nn.Module:
    """A block, and fully connected layers of other sizes and curves."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 70), nn.GELU(), nn.Linear(70, 3), nn.SiLU(), nn.Linear(3, 33)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(mk.InvertedResidual(3, 8), *pool, *layers, nn.Hardswish()).eval()
