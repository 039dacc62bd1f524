"""A table with its heading, what it shows, and where its rows come from."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..harness import RESULTS, Row
from ..machine import ROOT

# Pages with tables are in docs/.
_FIGURES = Path("..") / RESULTS.relative_to(ROOT)


@dataclass(frozen=True)
class Section:
    """Part of a page: nothing at all where there are no rows for the table.

    figures: by the name of a file in the folder of results, what it shows; of the same rows.
    """

    title: str
    text: str
    table: str
    rows: list[Row]
    figures: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.table:
            return ""
        parts = [f"## {self.title}", _wrapped(self.text), self.table, source(self.rows)]
        parts += [f"![{shows}]({_FIGURES / name})" for name, shows in self.figures.items()]
        return "\n" + "\n\n".join(parts) + "\n"


def source(rows: list[Row]) -> str:
    """Machine, software, commits and dates of the rows, from the rows themselves."""
    machines: dict[str, list[Row]] = {}
    for row in rows:
        machines.setdefault(_gpu(row) if "gpu" in row else _cpu(row), []).append(row)
    return "\n".join(_wrapped(_sentence(*of_one)) for of_one in machines.items())


def _sentence(machine: str, rows: list[Row]) -> str:
    versions = {f"{name} {v}" for row in rows for name, v in row.get("versions", {}).items()}
    runs: dict[str, dict[str, None]] = {}
    for row in rows:
        run = f"{row['commit']} on {row['date'][:10]}"
        runs.setdefault(run, {})[row["provider"]] = None
    if len(runs) > 1:
        runs = {f"{run} ({', '.join(providers)})": {} for run, providers in runs.items()}
    with_versions = f" With {', '.join(sorted(versions, key=str.lower))}." if versions else ""
    commits = "commits" if len(runs) > 1 else "commit"
    return f"Measured on {machine}; {commits} {', '.join(runs)}.{with_versions}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _cpu(row: Row) -> str:
    cores = f"{row['cores']} core" + "s" * (row["cores"] > 1)
    return (
        f"{row['cpu']}, {cores}, L1d {row['l1d']}, L2 {row['l2']}, L3 {row['l3']};"
        f" {row['system']}, torch {row['torch']}, Python {row['python']},"
        f" compiler {row['compiler']}"
    )


def _gpu(row: Row) -> str:
    return (
        f"{row['gpu']}, driver {row['driver']}, CUDA {row['cuda']}, torch {row['torch']},"
        f" Triton {row['triton']}"
    )
