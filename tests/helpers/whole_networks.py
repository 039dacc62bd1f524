"""Networks that run as one call: made, counted and compared."""

import copy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import randomise_norms
from mnv2_kernels.fuse import live_network as joined


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The dimensions of the result of every call from now on that runs several layers."""
    seen: list[int] = []
    run_plan = joined.run_plan

    def counted(x, *args):
        y = run_plan(x, *args)
        seen.append(y.dim())
        return y

    monkeypatch.setattr(joined, "run_plan", counted)
    return seen


def ready(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(model, torch.randn(4, 3, 64, 64))


def expect(original: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(original).double()(x.double())


def assert_same(found: Tensor, expected: Tensor, within: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= within * expected.abs().max()
