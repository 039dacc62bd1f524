"""The process that one peer runs in: `python -m benchmarks.peers.worker`.

Reads a JSON object a line and answers each with one: {"do": NAME, ...} calls the method of that
name. Between its turns it waits for a line, so that no other process is disturbed.
"""

import gc
import json
import os
import statistics
import sys
from importlib import import_module
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import nn

from mnv2_kernels.profiling import timing

from .. import machine, resident
from .cases import Case, folded
from .limits import Avx512Watch
from .lost_time import LostTime
from .peer import Loaded, Peer
from .registry import PEERS

# Before a turn's first sample: threads are awake again, and caches hold what the last run left.
WARMUP = 2
# Long enough for every layer, and every thread of a pool, to have had its turn.
WATCHED_SECONDS = 0.02
# Some runtimes pack weights or plan their memory in the first ones.
FIRST_RUNS = 5


class Worker:
    """At most one loaded model."""

    def __init__(self):
        self.loaded: Loaded | None = None
        self.cpu_seconds = process_time()

    def convert(self, peer: str, case: str, folder: str) -> dict:
        """Fill the folder for `load`."""
        workload = _case(case)
        torch.set_num_threads(workload.threads)
        # Tensors of inference mode cannot be exported.
        with torch.inference_mode(False), torch.no_grad():
            PEERS[peer].convert(folded(workload.model()), workload.input(), Path(folder))
        return {}

    def load(self, peer: str, case: str, folder: str | None, result: str) -> dict:
        """Make the model ready, run it and save what it gives.

        Returns the instruction set that this process was asked for, and whether runs have used
        AVX-512 registers; None where the system does not say.
        """
        self.loaded = None
        gc.collect()
        workload = _case(case)
        source = _source(PEERS[peer], workload, folder)
        self.loaded = PEERS[peer].load(source, workload.input(), workload.threads)
        # The last of several: one that has spoilt its input, or its packed weights, is found out.
        watch = Avx512Watch()
        begin = perf_counter()
        runs = 0
        while runs < 1 + WARMUP or perf_counter() - begin < WATCHED_SECONDS:
            self.loaded.run()
            runs += 1
        used = watch.used()
        torch.save(self.loaded.output().contiguous(), result)
        self.cpu_seconds = process_time()
        return {"instruction_set": machine.instruction_set(), "used_avx512": used}

    def memory(self, peer: str, case: str, folder: str | None) -> dict:
        """Resident bytes that a load adds, and that the first runs add to it at their peak.

        The input counts as loaded, and so do weights; libraries have been imported before.
        """
        for name in PEERS[peer].modules:
            import_module(name)
        workload = _case(case)
        source = _source(PEERS[peer], workload, folder)
        before = resident.settled()
        self.loaded = PEERS[peer].load(source, workload.input(), workload.threads)
        loaded = resident.settled()
        for _ in range(FIRST_RUNS):
            self.loaded.run()
        return {"load_bytes": loaded - before, "run_bytes": resident.peak() - loaded}

    def turn(self, seconds: float) -> dict:
        """Time runs for so long; at least three.

        Returns the median, the share of time that was lost meanwhile, and how long this process
        has computed since its last turn, when it should have waited.
        """
        idle = process_time() - self.cpu_seconds
        for _ in range(WARMUP):
            self.loaded.run()
        samples = []
        lost = LostTime()
        begin = now = perf_counter()
        while len(samples) < 3 or now - begin < seconds:
            before = now
            self.loaded.run()
            now = perf_counter()
            samples.append(now - before)
        answer = {"value": statistics.median(samples), "lost": lost.share(), "idle_cpu": idle}
        self.cpu_seconds = process_time()
        return answer

    def peak(self, threads: int, seconds: float) -> dict:
        """GFLOP/s of multiply-adds in registers, 0 without the extension."""
        lost = LostTime()
        rate = timing.fma_peak(threads, seconds=seconds) or 0.0
        return {"value": rate, "lost": lost.share()}


def _source(peer: Peer, workload: Case, folder: str | None) -> nn.Module | Path:
    """What the peer loads, with PyTorch's threads set."""
    torch.set_num_threads(workload.threads)
    if folder is not None:
        return Path(folder)
    return workload.model() if peer.as_written else folded(workload.model())


def _case(name: str) -> Case:
    workload, _, threads = name.rpartition("/t")
    return Case(workload, int(threads))


def main() -> None:
    # Libraries print; what they print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.disable()
    worker = Worker()
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(worker, request.pop("do"))(**request)
            except Exception as error:
                sentence = next(iter(str(error).splitlines()), "")
                answer = {"error": f"{type(error).__name__}: {sentence}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
