"""The example of docs/recognizers.md: an operation that is not understood until it is added."""

from pathlib import Path

import pytest
import torch
from foreign_blocks import (
    Flat,
    flow,
    largest_difference,
)
from same_answers import randomise
from torch import nn

import mnv2_kernels as mk
from mnv2_kernels.recognizers import trace

PAGE = Path(__file__).parents[2] / "docs" / "recognizers.md"


def block(*arguments):
    return randomise(Flat(flow(act=lambda: nn.Threshold(*arguments)), True)).double()


def states(module):
    return [row.state for row in mk.explain(module)]


def test_example_adds_an_operation(monkeypatch):
    monkeypatch.setattr(trace, "OPERATIONS", dict(trace.OPERATIONS))
    assert states(block(0, 0)) == ["declined"]
    (_, example, _) = PAGE.read_text().replace("```python", "```").split("```")
    exec(compile(example, str(PAGE), "exec"), {})
    fused = mk.fuse(plain := block(0, 0), backend="reference")
    assert states(fused) == ["fused"]
    x = 4 * torch.randn(2, 8, 9, 10, dtype=torch.float64)
    with torch.no_grad():
        assert largest_difference(fused(x), plain(x)) < 1e-12
    with pytest.raises(ValueError, match="a threshold of 1 that gives 0 is no clip, in conv.2"):
        mk.fold(block(1, 0))
