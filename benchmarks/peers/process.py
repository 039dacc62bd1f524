"""The other end of a worker: starts its process, asks, and ends it."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from select import select

from ..machine import ROOT


class WorkerFailed(Exception):
    """A worker could not do what it was asked for; the sentence says why."""


class WorkerProcess:
    """A process of its own for one peer, with its log; one question at a time.

    threads: of the pools that are sized when a library is loaded. log: what its libraries print.
    """

    def __init__(self, name: str, threads: int, log: Path):
        self.name = name
        self.log = log
        self._threads = threads
        self._start()

    def _start(self) -> None:
        with self.log.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.worker"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def revive(self) -> None:
        """Start the process again if it has ended."""
        if self._process.poll() is not None:
            self.close()
            self._start()

    def ask(self, do: str, *, timeout: float = 600.0, **arguments: object) -> dict:
        """The worker's answer.

        Raises:
            WorkerFailed: it says so, has ended, or gives no answer within `timeout` seconds.
        """
        line = json.dumps({"do": do, **arguments}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(do) from None
        if not select([self._process.stdout], [], [], timeout)[0]:
            self._process.kill()
            raise WorkerFailed(f"{self.name}: no answer to {do} within {timeout:.0f} s")
        answer = self._process.stdout.readline()
        if not answer:
            raise self._ended(do)
        answer = json.loads(answer)
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process; it may have ended already."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ended(self, do: str) -> WorkerFailed:
        status = self._process.wait()
        return WorkerFailed(f"{self.name}: ended with status {status} at {do}; see {self.log}")
