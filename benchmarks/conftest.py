"""Where rows go, and what is printed at the end."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mnv2_kernels.ops.extension import module as _C

from . import harness
from .report import summary

ROWS = pytest.StashKey[list[harness.Row]]()


def pytest_addoption(parser):
    group = parser.getgroup("mnv2_kernels")
    group.addoption(
        "--results", type=Path, default=harness.RESULTS, help="folder that rows are added to"
    )
    group.addoption(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="of a turn that may be lost to other processes and machines (bench_widths.py)",
    )
    group.addoption("--compile", action="store_true", help="time torch.compile too (a minute)")


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_collection_modifyitems(items):
    if _C is None:
        missing = pytest.mark.skip(reason="needs the compiled extension")
        for item in items:
            item.add_marker(missing)


@pytest.fixture
def record(request, benchmark) -> Callable[[list[harness.Row]], None]:
    """Keep rows for the end of the run, and in pytest-benchmark's own report."""

    def keep(rows: list[harness.Row]) -> None:
        request.config.stash[ROWS] += rows
        benchmark.extra_info["rows"] = rows

    return keep


def pytest_terminal_summary(terminalreporter, config):
    rows = summary.with_common_bound(config.stash[ROWS])
    harness.append(rows, config.getoption("--results"))
    for line in summary.lines(rows):
        terminalreporter.write_line(line)
