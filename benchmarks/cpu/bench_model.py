"""A whole MobileNetV2 1.0 at 224x224: as a plan, with its blocks fused, and unfused."""

import pytest
import torch

from mnv2_kernels import plan
from mnv2_kernels.block import cost
from mnv2_kernels.profiling import memory_report
from mnv2_kernels.profiling.timing import num_threads

from .. import harness
from .bench_block import THREADS


@pytest.mark.parametrize("batch", (1, 8, 32))
@pytest.mark.parametrize("threads", THREADS)
def test_network(benchmark, record, request, threads, batch):
    name, model = harness.network()
    planned = plan(model, (3, 224, 224))
    models = {"planned": planned, **harness.providers(model)}
    with num_threads(threads):
        planned_bytes = memory_report.planned_bytes(planned, batch)
    if request.config.getoption("--compile"):
        models["compiled"] = torch.compile(models["folded"])
    x = harness.image(3, 224, batch)
    rows = harness.measure(
        {provider: (lambda m=m: m(x)) for provider, m in models.items()},
        x=x,
        expected=harness.truth(model, x),
        flops=2 * cost.network_multiply_adds(batch=batch),
        threads=threads,
        rounds={1: 21, 8: 9, 32: 5}[batch],
        repeats=3 if batch == 1 else 1,
        computed_peaks={
            execution: cost.network_peak_bytes(execution=execution, batch=batch)
            for execution in cost.EXECUTIONS
        }
        | {"planned": planned_bytes},
        suite="network",
        model=name,
        resolution=224,
    )
    record(rows)
    with torch.inference_mode(), num_threads(threads):
        benchmark.pedantic(models["fused"], (x,), rounds=5, iterations=3, warmup_rounds=1)
