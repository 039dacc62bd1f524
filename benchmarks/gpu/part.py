"""What every part of the GPU suite gets: a place for rows, a deadline, and child processes."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..harness import Row, append, load
from ..machine import ROOT
from .machine import gpu_facts, measure_device

NO_TIME = "no time left"


class Failed(Exception):
    """A part has found something wrong; the sentence says what."""


@dataclass(frozen=True)
class Context:
    """`deadline` is a reading of time.monotonic(); a dry run is one on a CPU, of tiny shapes."""

    out: Path
    deadline: float
    dry_run: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def keep(self, rows: Iterable[Row]) -> None:
        """Append rows to the files of their suites, with what all rows say."""
        marks = {"dry_run": True} if self.dry_run else {}
        append(({**row, **gpu_facts(), **marks} for row in rows), self.out)

    def skip(self, suite: str, reason: str, **labels: object) -> None:
        """Say, here and in the rows, that a workload was left out."""
        print(f"{suite}: skipped, {reason}: {labels}", flush=True)
        self.keep([{"suite": suite, "skipped": reason, **labels}])

    def done(self, suite: str, **labels: object) -> bool:
        """Whether rows of this commit and this kind of run hold the workload already.

        They do not where time ran out before it, or before one of its providers was built.
        """
        wanted = {"commit": gpu_facts()["commit"], "gpu": gpu_facts()["gpu"], **labels}
        rows = [
            row
            for row in load(suite, self.out)
            if "skipped" not in row
            and bool(row.get("dry_run")) == self.dry_run
            and all(row.get(field) == value for field, value in wanted.items())
        ]
        newest = {row["provider"]: row for row in rows}
        return bool(newest) and not any(NO_TIME in row.get("error", "") for row in newest.values())

    def device_row(self) -> Row:
        """The newest row of `gpu_device`, measured now where there is none of this GPU."""
        gpu = gpu_facts()["gpu"]
        rows = [
            row
            for row in load("gpu_device", self.out)
            if row["gpu"] == gpu and bool(row.get("dry_run")) == self.dry_run
        ]
        if rows:
            return rows[-1]
        row = measure_device(dry_run=self.dry_run)
        self.keep([row])
        return row


def child(
    command: list[str], seconds: float, *, stream: bool = False, **variables: str
) -> tuple[int | None, str]:
    """(exit code, output) of a command, which is killed with all its children after `seconds`.

    The exit code is None after a kill. With `stream`, the output goes to this process's own output.
    Triton's interpreter is switched off.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=None if stream else output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read()
