"""A torchvision block, what a model answers, and that it still answers so."""

import torch
from same_answers import randomise
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionBlock


def image(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape or (2, 8, 9, 7), generator=generator)


def block(kind: type[nn.Module] = TorchvisionBlock) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind(8, 8, 1, 6)).eval()


def answers(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(image() if x is None else x)


def assert_same(model: nn.Module, truth: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(answers(model), truth, rtol=1e-4, atol=1e-4, msg=what)
