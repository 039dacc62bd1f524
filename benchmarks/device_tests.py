"""A plugin of pytest that counts where Triton kernels ran: `-p benchmarks.device_tests`.

Every process writes what it has seen to the folder that MNV2_DEVICE_TESTS names, when it ends.
"""

import json
import os
from collections import Counter
from pathlib import Path

from triton import knobs

from mnv2_kernels.triton_kernels import interpreter

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


def count_launch(metadata) -> None:
    launches["device"] += 1


def pytest_unconfigure(config):
    folder = os.environ.get("MNV2_DEVICE_TESTS")
    if folder:
        Path(folder, f"{os.getpid()}.json").write_text(json.dumps(launches))
