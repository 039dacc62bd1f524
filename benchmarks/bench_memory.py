"""Peak memory of a whole MobileNetV2 1.0 at 224x224 by batch: measured, and computed."""

import pytest
import torch

from mnv2_kernels import cost
from mnv2_kernels.memory import peak_bytes
from mnv2_kernels.timing import num_threads

from . import harness
from .machine import facts


@pytest.mark.parametrize("batch", (1, 2, 8))
def test_memory(benchmark, record, batch):
    name, model = harness.network()
    x = harness.image(3, 224, batch)
    rows = []
    with torch.inference_mode(), num_threads(1):
        for provider, copy in harness.providers(model).items():
            copy(x)
            rows.append(
                {
                    "suite": "memory",
                    "model": name,
                    "provider": provider,
                    "batch": batch,
                    "dtype": "float32",
                    "threads": 1,
                    "resolution": 224,
                    "peak_bytes": x.nbytes + peak_bytes(lambda copy=copy: copy(x)),
                    "peak_bytes_computed": cost.network_peak_bytes(execution=provider, batch=batch),
                    **facts(),
                }
            )
        benchmark.pedantic(copy, (x,), rounds=1)
    record(rows)
