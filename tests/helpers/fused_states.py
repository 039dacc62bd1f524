"""Models to fuse for tests of what is done to them afterwards, and how they are compared."""

import numpy as np
import torch
from forwards import Copied
from forwards_of_libraries import with_leftovers
from same_answers import enliven, image
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock

import mnv2_kernels as mk

IMAGE, FEATURES = image(2, 3, 32, 32), image(2, 8, 12, 12)


def with_flag(flag):
    block = Copied()
    block.use_res_connect = flag
    return block


def sequence():
    return nn.Sequential(TorchvisionBlock(8, 8, 1, 3), TorchvisionBlock(8, 16, 2, 6))


def small_network():
    return mobilenet_v2(width_mult=0.35, num_classes=10)


# What is fused, and an input for it.
STATES = {
    "block": (lambda: TorchvisionBlock(8, 8, 1, 3), FEATURES),
    "copied block": (Copied, FEATURES),
    "flag 1": (lambda: with_flag(1), FEATURES),
    "flag np.bool_": (lambda: with_flag(np.bool_(True)), FEATURES),
    "leftover buffers": (lambda: with_leftovers(Copied()), FEATURES),
    "sequence": (sequence, FEATURES),
    "network": (small_network, IMAGE),
    "network with leftovers": (lambda: with_leftovers(small_network()), IMAGE),
}


def make_pair(name):
    """(the layers, the same fused and called twice, x), in evaluation mode."""
    torch.manual_seed(0)
    build, x = STATES[name]
    plain = enliven(build(), x)
    fused = mk.fuse(plain)
    check(plain, fused, x)
    return plain, fused, x


def answer(model, x):
    with torch.no_grad():
        return model(x)


def check(plain, fused, x, what=""):
    """The next two calls answer as the layers do."""
    for _ in range(2):
        expected, found = answer(plain, x), answer(fused, x)
        assert found.shape == expected.shape, what
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error <= 1e-4, what


def states(model):
    return {row.state for row in mk.explain(model)}
