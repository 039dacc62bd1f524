"""Peak memory of a whole MobileNetV2 1.0 at 224x224 by batch: measured, and computed.

`planned` is the network as one call on one arena (`mnv2_kernels.plan`). `resident_bytes` of a row
is a cross-check: by how much one call lifts the peak of a fresh process, allocator's gaps and
libraries' own memory included (`resident.py`, with this package's network); none off Linux.
"""

import subprocess
import sys

import pytest
import torch

from mnv2_kernels import cost, memory_report, plan
from mnv2_kernels.memory import peak_bytes
from mnv2_kernels.timing import num_threads

from . import harness
from .machine import ROOT, facts


@pytest.mark.parametrize("batch", (1, 2, 8))
def test_memory(benchmark, record, batch):
    name, model = harness.network()
    x = harness.image(3, 224, batch)
    rows = []
    with torch.inference_mode(), num_threads(1):
        planned = plan(model, x.shape)
        for provider, copy in {"planned": planned, **harness.providers(model)}.items():
            copy(x)
            if provider == "planned":
                computed = memory_report.planned_bytes(planned, batch)
            else:
                computed = cost.network_peak_bytes(execution=provider, batch=batch)
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
                    "peak_bytes_computed": computed,
                    "resident_bytes": resident_bytes(provider, batch),
                    **facts(),
                }
            )
        benchmark.pedantic(planned, (x,), rounds=1)
    record(rows)


def resident_bytes(execution: str, batch: int) -> int | None:
    """What `resident.py` prints in a process of its own."""
    if sys.platform != "linux":
        return None
    command = [sys.executable, "-m", "benchmarks.resident", execution, f"--batch={batch}"]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
