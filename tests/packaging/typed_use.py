"""What a user writes. mypy reads it, see test_types.py; nothing runs it."""

import torch
from torch import Tensor, nn

import mnv2_kernels as mk
from mnv2_kernels.types import Plan, Report


def prepare(model: nn.Module) -> tuple[nn.Module, Plan]:
    report: Report = mk.explain(model)
    print(mk.__version__, report.summary)
    fused = mk.fuse(model, verify=True)
    return fused, mk.plan(fused, (3, 224, 224), dtype=torch.bfloat16)


def halve(x: Tensor) -> Tensor:
    weights: mk.FoldedWeights = mk.fold(mk.InvertedResidual(16, 24, stride=2))
    return mk.inverted_residual(x, weights, stride=2, backend="cpu")
