"""A training step of MobileNetV2 1.0 at 224x224: time and memory.

With norms that train ("batch": statistics of the batch) and with frozen ones. The step is forward,
loss and backward; `peak_bytes` is the most it holds at any time beyond the parameters, their
gradients included. `eager` is the same network layer by layer, channels_last; `checkpointed` that
with `torch.utils.checkpoint` around every block, and `compiled` that under `torch.compile`.
"""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnv2_kernels import freeze_bn
from mnv2_kernels.profiling.memory import live_bytes
from mnv2_kernels.profiling.timing import interleave, num_threads, quartiles, speedup
from mnv2_kernels.profiling.variants import training_variants

from .. import harness
from ..machine import facts
from .bench_block import THREADS

# Of the mean gradient, besides twice eager's. A wrong mask or a gradient left out is above 1e-1.
MEAN_TOLERANCE = 1e-2


@pytest.mark.parametrize("norms,batch", [("frozen", 1), ("frozen", 8), ("batch", 1), ("batch", 8)])
@pytest.mark.parametrize("threads", THREADS)
def test_training_step(benchmark, record, threads, norms, batch):
    name, model = harness.network()
    eager = (freeze_bn(model) if norms == "frozen" else deepcopy(model)).train()
    for module in eager.modules():
        # torch.compile draws the random numbers of a dropout from elsewhere.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # As torchvision has it; without one, torch.compile runs most of the layers one by one.
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    models = training_variants(eager)
    if norms == "batch":
        torch._dynamo.reset()
        own = deepcopy(eager).to(memory_format=torch.channels_last)
        models["compiled"] = torch.compile(own)
    steps = {provider: Step(copy, batch) for provider, copy in models.items()}
    with num_threads(threads):
        check(steps, Step(deepcopy(eager).double(), batch))
        samples = interleave(steps, rounds=5 if batch == 8 else 15)
        peaks = {
            provider: max(live_bytes(step.without_gradients())) for provider, step in steps.items()
        }
        rows = []
        for provider in steps:
            lower, middle, upper = quartiles(samples[provider])
            others = [other for other in steps if other != provider]
            rows.append(
                {
                    "suite": "training",
                    "model": name,
                    "norms": norms,
                    "provider": provider,
                    "batch": batch,
                    "dtype": "float32",
                    "threads": threads,
                    "resolution": 224,
                    "seconds": {"25%": lower, "50%": middle, "75%": upper},
                    "rounds": len(samples[provider]),
                    "speedup": {o: speedup(samples[provider], samples[o]) for o in others},
                    "peak_bytes": peaks[provider],
                    "share_of_peak_bytes": {o: peaks[provider] / peaks[o] for o in others},
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
    errors = {
        provider: ((step.gradient() - exact).abs().mean() / exact.abs().mean()).item()
        for provider, step in steps.items()
    }
    allowed = max(MEAN_TOLERANCE, 2 * errors["eager"])
    for provider, error in errors.items():
        if not error <= allowed:
            raise AssertionError(
                f"{provider}: mean error must be at most {allowed:.2e}, got {error:.2e}"
            )
