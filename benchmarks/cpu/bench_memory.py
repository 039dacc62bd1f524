"""Peak memory of a whole MobileNetV2 1.0 at 224x224 by batch: measured, and computed.

`planned` is the network as one call on one arena (`mk.plan`). `resident_bytes` of a row
is a cross-check: by how much one call lifts the peak of a fresh process, allocator's gaps and
libraries' own memory included (`resident.py`, with this package's network); none off Linux.

The peers that are installed are measured by resident bytes alone, ours in the same way: each loads
the network in a fresh process that has imported its libraries, and runs it a few times. Some take
their memory when they load, some when they run, so that only the sum can be compared; from one
batch to another it grows by what further images need, without weights.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mnv2_kernels import plan
from mnv2_kernels.block import cost
from mnv2_kernels.profiling import memory_report
from mnv2_kernels.profiling.memory import peak_bytes_again
from mnv2_kernels.profiling.timing import num_threads

from .. import harness
from ..machine import ROOT, facts
from ..peers.cases import Case
from ..peers.conversion import CACHE, converted
from ..peers.peer import Peer
from ..peers.process import WorkerFailed, WorkerProcess
from ..peers.registry import PEERS


@pytest.mark.parametrize("batch", (1, 2, 8))
def test_memory(benchmark, record, batch):
    name, model = harness.network()
    x = harness.image(3, 224, batch)
    rows = []
    with torch.inference_mode(), num_threads(1):
        planned = plan(model, x.shape)
        for provider, copy in {"planned": planned, **harness.providers(model)}.items():
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
                    "peak_bytes": x.nbytes + peak_bytes_again(lambda copy=copy: copy(x)),
                    "peak_bytes_computed": computed,
                    "resident_bytes": resident_bytes(provider, batch),
                    **facts(),
                }
            )
        benchmark.pedantic(planned, (x,), rounds=1)
    record(rows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident bytes from /proc")
@pytest.mark.parametrize("batch", (1, 8))
def test_peers_memory(benchmark, record, tmp_path, batch):
    case = Case(f"net_b{batch}", 1)
    peers = [peer for peer in PEERS.values() if peer.why_not() is None]
    rows, failures = benchmark.pedantic(peer_rows, (peers, case, tmp_path), rounds=1)
    record(rows)
    assert not failures


def peer_rows(
    peers: Sequence[Peer], case: Case, logs: Path
) -> tuple[list[harness.Row], list[WorkerFailed]]:
    """A row of each, or why there is none."""
    rows, failures = [], []
    for peer in peers:
        try:
            rows.append(peer_row(peer, case, logs))
        except WorkerFailed as failure:
            failures.append(failure)
    return rows, failures


def peer_row(peer: Peer, case: Case, logs: Path, cache: Path = CACHE) -> harness.Row:
    """A row of suite `peers-memory`: what a load and the first runs add to a fresh process."""
    folder = converted(peer, case, case.model(), cache)
    with WorkerProcess(peer.name, case.threads, logs / f"{peer.name}.log") as worker:
        found = worker.ask(
            "memory", peer=peer.name, case=str(case), folder=None if folder is None else str(folder)
        )
    return {
        "suite": "peers-memory",
        "case": str(case),
        **case.labels(),
        "provider": peer.name,
        "batch": case.batch,
        "dtype": peer.precision,
        "threads": case.threads,
        **found,
        "versions": peer.versions(),
        **facts(),
    }


def resident_bytes(execution: str, batch: int) -> int | None:
    """What `resident.py` prints in a process of its own."""
    if sys.platform != "linux":
        return None
    command = [sys.executable, "-m", "benchmarks.resident", execution, f"--batch={batch}"]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
