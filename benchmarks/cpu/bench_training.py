"""A fine-tuning step of MobileNetV2 1.0 at 224x224 with frozen batch norms: time and memory.

The step is forward, loss and backward; `peak_bytes` is the most it holds at any time beyond the
parameters, their gradients included. `eager` is the same network layer by layer, channels_last.
"""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnv2_kernels import freeze_bn, fuse
from mnv2_kernels.profiling.memory import live_bytes
from mnv2_kernels.profiling.timing import interleave, num_threads, quartiles, speedup

from .. import harness
from ..machine import facts
from .bench_block import THREADS

# Of the mean gradient. A wrong mask or a gradient left out is above 1e-1.
MEAN_TOLERANCE = 1e-2


@pytest.mark.parametrize("batch", (1, 8))
@pytest.mark.parametrize("threads", THREADS)
def test_fine_tuning_step(benchmark, record, threads, batch):
    name, model = harness.network()
    eager = freeze_bn(model).to(memory_format=torch.channels_last).train()
    steps = {
        provider: Step(copy, batch)
        for provider, copy in {"fused": fuse(eager), "eager": eager}.items()
    }
    with num_threads(threads):
        check(steps, Step(deepcopy(eager).double(), batch))
        samples = interleave(steps, rounds=5 if batch == 8 else 15)
        peaks = {
            provider: max(live_bytes(step.without_gradients())) for provider, step in steps.items()
        }
        rows = []
        for provider, other in (("fused", "eager"), ("eager", "fused")):
            lower, middle, upper = quartiles(samples[provider])
            rows.append(
                {
                    "suite": "training",
                    "model": name,
                    "provider": provider,
                    "batch": batch,
                    "dtype": "float32",
                    "threads": threads,
                    "resolution": 224,
                    "seconds": {"25%": lower, "50%": middle, "75%": upper},
                    "rounds": len(samples[provider]),
                    "speedup": {other: speedup(samples[provider], samples[other])},
                    "peak_bytes": peaks[provider],
                    "share_of_peak_bytes": {other: peaks[provider] / peaks[other]},
                    **facts(),
                }
            )
        benchmark.pedantic(steps["fused"], rounds=1)
    record(rows)


class Step:
    """Forward, cross-entropy and backward over one batch, the same for every model."""

    def __init__(self, model: nn.Module, batch: int):
        self.model = model
        self.x = harness.image(3, 224, batch).to(next(model.parameters()).dtype)
        self.classes = torch.arange(batch)

    def __call__(self) -> Tensor:
        torch.manual_seed(0)  # of the dropout
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.classes)
        loss.backward()
        return loss.detach()

    def without_gradients(self) -> "Step":
        """The same, to begin with no gradients from a step before."""
        self.model.zero_grad()
        return self

    def gradient(self) -> Tensor:
        self()
        return torch.cat([p.grad.double().flatten() for p in self.model.parameters()])


def check(steps: dict[str, Step], truth: Step) -> None:
    """Raise where gradients are no rounding errors away from those in float64.

    In the mean: a value that rounds across a clip's bound changes a few gradients by much.
    """
    exact = truth.gradient()
    for provider, step in steps.items():
        error = ((step.gradient() - exact).abs().mean() / exact.abs().mean()).item()
        if not error <= MEAN_TOLERANCE:
            raise AssertionError(
                f"{provider}: mean error must be at most {MEAN_TOLERANCE:g}, got {error:.2e}"
            )
