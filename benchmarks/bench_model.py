"""A whole MobileNetV2 1.0 at 224x224, its blocks fused, against the same network unfused."""

import pytest
import torch

from mnv2_kernels import cost
from mnv2_kernels.timing import num_threads

from . import harness
from .bench_block import THREADS


@pytest.mark.parametrize("batch", (1, 8))
@pytest.mark.parametrize("threads", THREADS)
def test_network(benchmark, record, request, threads, batch):
    name, model = harness.network()
    models = harness.providers(model)
    if request.config.getoption("--compile"):
        models["compiled"] = torch.compile(models["folded"])
    x = harness.image(3, 224, batch)
    rows = harness.measure(
        {provider: (lambda m=m: m(x)) for provider, m in models.items()},
        x=x,
        expected=harness.truth(model, x),
        flops=2 * cost.network_multiply_adds(batch=batch),
        threads=threads,
        rounds=21 if batch == 1 else 9,
        repeats=3 if batch == 1 else 1,
        computed_peaks={
            execution: cost.network_peak_bytes(execution=execution, batch=batch)
            for execution in cost.EXECUTIONS
        },
        suite="network",
        model=name,
        resolution=224,
    )
    record(rows)
    with torch.inference_mode(), num_threads(threads):
        benchmark.pedantic(models["fused"], (x,), rounds=5, iterations=3, warmup_rounds=1)
