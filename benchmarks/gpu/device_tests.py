"""A plugin of pytest that tells what became of tests and where kernels ran.

`-p benchmarks.device_tests`. Every process writes to the folder that MNV2_DEVICE_TESTS names, as
tests start and end, so that what is known outlives it: PID.outcomes with a line of outcome and id,
PID.json with launches by place.
"""

import json
import os
from collections import Counter
from pathlib import Path

import torch
from triton import knobs

from mnv2_kernels.ops.inverted_residual import _ops
from mnv2_kernels.ops.triton import interpreter

launches: Counter[str] = Counter()


def current_test() -> str:
    """Id of the test that runs."""
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]


def pytest_configure(config):
    interpret = interpreter.run

    def counted(*args, **kwargs):
        launches[f"interpreted: {current_test()}"] += 1
        return interpret(*args, **kwargs)

    interpreter.run = counted
    knobs.runtime.launch_enter_hook.add(count_launch)
    _ops["cuda"] = counting(_ops["cuda"])


def count_launch(metadata) -> None:
    launches["device"] += 1


def counting(op):
    """The op, with its calls by the backend `cuda` counted where they are not traced."""

    def call(*arguments):
        y = op(*arguments)
        if not torch.compiler.is_compiling():
            launches["cuda"] += 1
        return y

    return call


def file(ending: str) -> Path | None:
    folder = os.environ.get("MNV2_DEVICE_TESTS")
    return Path(folder, f"{os.getpid()}{ending}") if folder else None


def keep_outcome(outcome: str, test: str) -> None:
    if path := file(".outcomes"):
        with path.open("a") as lines:
            lines.write(f"{outcome} {test}\n")


def keep_launches() -> None:
    """Whole or not at all: the process may be ended at any time."""
    if path := file(".json"):
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(launches))
        unfinished.replace(path)


def pytest_runtest_logstart(nodeid, location):
    keep_outcome("unfinished", nodeid)


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        keep_outcome(report.outcome, report.nodeid)
    if report.when == "teardown":
        keep_launches()


def pytest_unconfigure(config):
    keep_launches()
