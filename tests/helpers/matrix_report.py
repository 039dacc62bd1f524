"""What a run of the tests has checked, by the rows of matrix.py, from its junit files.

    python tests/matrix_report.py short build/tests/short   # after `make test`
    python tests/matrix_report.py long build/tests/long     # after `make test-long`
    python tests/matrix_report.py gpu FOLDER                # after gpu.suite --out FOLDER

The first two write the table of rows to docs/testing.md, and a long run its figures.

A test counts as one case, or as many as it has said (the fixture `cases_checked`); one that failed
or was skipped counts as none, and one that ran several times (on other instruction sets) once. The
exit code is 1 where a row has fewer cases than asked for, a test failed, was skipped without a
reason or is expected to fail, or a backend that is there ran no kernel.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from matrix import BACKENDS, ON_DEVICE, ROWS, Row, rows_of

from benchmarks import harness, machine
from benchmarks.markdown import fill, markdown

PAGE = Path(__file__).parents[1] / "docs" / "testing.md"
# What pytest says where nothing was given.
NO_REASON = ("", "unconditional skip")


@dataclass(frozen=True)
class Result:
    """One test of one run; its name is as in matrix.py."""

    test: str
    run: str
    outcome: str
    seconds: float
    reason: str = ""
    cases: int = 1
    calls: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Figures:
    """What the tests of a row came to."""

    cases: int = 0
    again: int = 0
    tests: int = 0
    failed: int = 0
    seconds: float = 0.0
    skipped: Counter = field(default_factory=Counter)


def read(folder: Path) -> list[Result]:
    """Every test of every junit file in the folder, and every tool's run over the GPU's kernels.

    A run is named as its file is.
    """
    return [
        _result(element, path.stem)
        for path in sorted(folder.glob("*.xml"))
        for element in ElementTree.parse(path).iter("testcase")
    ] + [
        Result(
            f"{ON_DEVICE}::{row['tool']}[{row['backend']}]",
            "gpu_sanitizer",
            "passed" if row["passed"] else "failed",
            0.0,
            row.get("reason", ""),
            row["calls"],
        )
        for row in harness.load("gpu_sanitizer", folder)
        if "passed" in row
    ]


def _result(element: ElementTree.Element, run: str) -> Result:
    module, name = element.get("classname", ""), element.get("name", "")
    *_, file = module.split(".")
    # An error while collecting has the module for its name.
    test = f"{file}.py::{name}" if file else name
    outcome, reason = "passed", ""
    for child in element:
        if child.tag in ("failure", "error"):
            outcome, reason = "failed", child.get("message", "")
        elif child.tag == "skipped" and outcome != "failed":
            known = "xfail" in child.get("type", "")
            outcome, reason = "failed" if known else "skipped", child.get("message", "")
    said = [(p.get("name", ""), p.get("value", "")) for p in element.iter("property")]
    cases = [int(value) for key, value in said if key == "cases"]
    calls = Counter()
    for key, value in said:
        if key.startswith("calls "):
            calls[key.removeprefix("calls ")] += int(value)
    seconds = float(element.get("time", 0))
    return Result(test, run, outcome, seconds, reason, sum(cases) if cases else 1, calls)


def count(results: Iterable[Result]) -> Figures:
    """Cases of distinct tests; those of further runs of the same test are `again`."""
    figures, most = Figures(), Counter()
    for result in results:
        figures.seconds += result.seconds
        figures.tests += 1
        figures.failed += result.outcome == "failed"
        if result.outcome == "skipped":
            figures.skipped[result.reason] += 1
        elif result.outcome == "passed":
            figures.again += result.cases
            most[result.test] = max(most[result.test], result.cases)
    figures.cases = most.total()
    figures.again -= figures.cases
    return figures


def by_row(results: list[Result]) -> dict[str, Figures]:
    """Figures of every row, and those of the tests of none behind an empty id."""
    members: dict[str, list[Result]] = {row.id: [] for row in ROWS} | {"": []}
    for result in results:
        for row in rows_of(result.test) or [None]:
            members[row.id if row else ""].append(result)
    return {id: count(found) for id, found in members.items()}


def complaints(results: list[Result], run: str, backends: Iterable[str] = BACKENDS) -> list[str]:
    """Why a run does not prove what it should; run: short, long or gpu."""
    if not results:
        return ["no test has run"]
    figures = by_row(results)
    found = [
        f"{row.id}: {figures[row.id].cases} cases, {row.asked_of(run)} are asked for"
        for row in ROWS
        if figures[row.id].cases < row.asked_of(run)
    ]
    for result in results:
        if result.outcome == "failed":
            found.append(f"{result.test} failed in {result.run}: {result.reason[:200]}")
        elif result.outcome == "skipped" and result.reason in NO_REASON:
            found.append(f"{result.test} was skipped in {result.run} without a reason")
    calls = sum((Counter(result.calls) for result in results), Counter())
    found += [f"no kernel of {name} has run" for name in backends if not calls[name]]
    return found


def show(results: list[Result], run: str) -> None:
    """The table, what was skipped and why, and what no row has."""
    figures = by_row(results)
    print(f"{'row':8} {'asked':>6} {'cases':>6} {'again':>6} {'failed':>6} {'skipped':>7} {'s':>6}")
    for row in ROWS:
        f = figures[row.id]
        cells = f"{row.asked_of(run):6} {f.cases:6} {f.again:6} {f.failed:6} {f.skipped.total():7}"
        print(f"{row.id:8} {cells} {f.seconds:6.0f}  {row.what}")
        for reason, number in f.skipped.most_common():
            print(f"{'':46} {number} skipped: {reason}")
    rest = [result for result in results if not rows_of(result.test)]
    print(f"\nOf no row: {figures[''].cases} cases")
    for file in sorted({result.test.partition("::")[0] for result in rest}):
        f = count(result for result in rest if result.test.startswith(file))
        print(f"  {file}: {f.cases} cases, {f.failed} failed, {f.seconds:.0f} s")
        for reason, number in f.skipped.most_common():
            print(f"{'':46} {number} skipped: {reason}")
    whole = count(results)
    calls = sum((Counter(result.calls) for result in results), Counter())
    print(
        f"\n{whole.cases} cases in {len({r.test for r in results})} tests, {whole.again} of them"
        f" again in other runs; {whole.failed} failed, {whole.skipped.total()} skipped;"
        f" {whole.seconds / 60:.0f} min of one core"
    )
    print("calls: " + ", ".join(f"{name} {number}" for name, number in sorted(calls.items())))


def rows_table() -> str:
    """docs/testing.md: the rows, and where each lives."""
    head = ["row", "what is checked", "cases asked for", "of a long run", "on a GPU", "tests"]
    return markdown(head, [[*_asked(row), _where(row)] for row in ROWS])


def _asked(row: Row) -> list[str]:
    numbers = (row.asked, row.long, row.gpu)
    return [row.id, row.what, *(str(number) if number else "-" for number in numbers)]


def _where(row: Row) -> str:
    """Each file with a link, and the functions of it that count if not all do."""
    files: dict[str, list[str]] = {}
    for pattern in row.tests:
        file, _, function = pattern.partition("[")[0].rstrip("*").partition("::")
        files.setdefault(file, []).append(function.removeprefix("test_").replace("_", " "))
    return "; ".join(
        f"[{file.removesuffix('.py')}](../tests/{file})"
        + (f": {', '.join(functions)}" if all(functions) else "")
        for file, functions in files.items()
    )


def run_table(results: list[Result]) -> str:
    """docs/testing.md: what a long run came to, and where it ran."""
    figures, facts, whole = by_row(results), machine.facts(), count(results)
    body = [
        [
            row.id,
            str(row.asked_of("long")),
            str(f.cases),
            str(f.again) if f.again else "-",
            str(f.failed),
            "; ".join(f"{number} {reason}" for reason, number in f.skipped.most_common()) or "-",
        ]
        for row in ROWS
        if (f := figures[row.id])
    ]
    head = ["row", "asked for", "cases", "again on other instruction sets", "failed", "skipped"]
    where = (
        f"{facts['date'][:10]}, commit {facts['commit']}: {facts['cpu']}, {facts['cores']} cores,"
        f" {facts['system']}, torch {facts['torch']}, Python {facts['python']}, compiler"
        f" {facts['compiler']}. {whole.cases} cases, {whole.failed} failed,"
        f" {whole.skipped.total()} skipped, {whole.seconds / 60:.0f} minutes of one core."
    )
    return f"{where}\n\n{markdown(head, body)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=("short", "long", "gpu"), help="what is asked for")
    parser.add_argument("folder", type=Path, help="of junit files")
    options = parser.parse_args()
    run, results = options.run, read(options.folder)
    show(results, run)
    wrong = complaints(results, run, () if run == "gpu" else BACKENDS)
    if run != "gpu":
        long_run = {"long-run": run_table(results)} if run == "long" else {}
        PAGE.write_text(fill(PAGE.read_text(), {"rows": rows_table(), **long_run}))
    print("\n".join(["", *wrong] if wrong else ["", "every row has what is asked for"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
