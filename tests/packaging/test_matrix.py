"""The test matrix names tests that exist, and its report tells a run that proves too little."""

import ast
import re
import sys
from functools import cache
from pathlib import Path
from xml.sax.saxutils import quoteattr

import matrix
import matrix_report
import pytest
from matrix import ON_DEVICE, ROWS, Row, belongs, rows_of

ROOT = Path(__file__).parents[2]
FILES = {path.name: path for path in ROOT.glob("tests/*/test_*.py")}
EDGES = ("begin", "end")


def path_of(file: str) -> Path:
    """Of a test, named in the matrix by its file or in the README by its path."""
    return ROOT / file if "/" in file else FILES[file]


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse(path_of(file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_rows_are_those_of_the_matrix():
    ids = [row.id for row in ROWS]
    assert [i for i in ids if "-" not in i] == [f"T{n}" for n in range(1, 31)]
    assert len(set(ids)) == len(ids)
    # Cases of the matrix that this project was set: sums without and with a GPU.
    assert sum(row.asked for row in ROWS) >= 5900 and sum(row.gpu for row in ROWS) >= 5500
    assert sum(row.asked_of("long") for row in ROWS) >= 36000


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_rows_name_tests_that_exist(row):
    for pattern in row.tests:
        if pattern == ON_DEVICE:
            continue
        file, _, function = pattern.partition("[")[0].rstrip("*").partition("::")
        assert file in FILES, pattern
        assert not function or function in functions(file), pattern


def test_the_page_is_of_this_matrix():
    """`make test-report` writes it."""
    page = matrix_report.PAGE.read_text()
    table = page.partition("<!-- begin:rows -->\n")[2].partition("\n<!-- end:rows -->")[0]
    assert table == matrix_report.rows_table()


def test_promises_are_kept_by_tests_that_exist():
    """Every point of "What you can rely on" names at least one."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## What you can rely on\n")[2].partition("\n## ")[0]
    points = section.split("\n- ")[1:]
    assert len(points) >= 12
    for point in points:
        links = re.findall(r"\[(\w+)\]\((tests/\w+/test_\w+\.py)\)", " ".join(point.split()))
        assert links, point
        for function, file in links:
            assert function.startswith("test_") and function in functions(file), (file, function)


def test_what_belongs_to_an_entry():
    assert belongs("test_a.py::test_b[c]", "test_a.py")
    assert belongs("test_a.py::test_b[c]", "test_a.py::test_b")
    assert belongs("test_a.py::test_b[c-d]", "test_a.py::test_b[c*")
    assert not belongs("test_a.py::test_bc", "test_a.py::test_b")
    assert not belongs("test_a.py::test_b[d]", "test_a.py::test_b[c*")
    assert not belongs("test_ab.py::test_b", "test_a.py")
    values = "test_inverted_residual.py::test_values[cpu-float32-S1]"
    assert [row.id for row in rows_of(values)] == ["T1"]


def case(name: str, inside: str = "", file: str = "test_a") -> str:
    return f'<testcase classname="tests.{file}" name={quoteattr(name)} time="2">{inside}</testcase>'


def properties(**values: int) -> str:
    said = [f'<property name="{k.replace("_", " ")}" value="{v}"/>' for k, v in values.items()]
    return f"<properties>{''.join(said)}</properties>"


GOOD = case("test_b[x]", properties(cases=5, calls_cpu=7)) + case(
    "test_b[y]", "<properties><property name='cases' value='2'/>"
    "<property name='cases' value='3'/><property name='calls triton' value='1'/></properties>"
)  # fmt: skip


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Complaints of a run that left these test cases, under a matrix of two rows."""
    rows = (Row("T1", "one", 10, ("test_a.py::test_b",), long=20), Row("T2", "two", 0, ("x",)))
    monkeypatch.setattr(matrix, "ROWS", rows)
    monkeypatch.setattr(matrix_report, "ROWS", rows)

    def read(run: str = "short", **files: str) -> list[str]:
        for name, text in files.items():
            xml = f"<testsuites><testsuite>{text}</testsuite></testsuites>"
            (tmp_path / f"{name}.xml").write_text(xml)
        return matrix_report.complaints(matrix_report.read(tmp_path), run)

    return read


def test_a_good_run(report, tmp_path, capsys):
    assert report(main=GOOD) == []
    results = matrix_report.read(tmp_path)
    figures = matrix_report.by_row(results)["T1"]
    assert (figures.cases, figures.again, figures.tests, figures.seconds) == (10, 0, 2, 4.0)
    matrix_report.show(results, "short")
    shown = capsys.readouterr().out
    assert "10 cases in 2 tests" in shown and "calls: cpu 7, triton 1" in shown


def test_the_same_test_on_another_instruction_set_counts_once(report, tmp_path):
    again = case("test_b[x]", properties(cases=4))
    assert report(main=GOOD, isa=again) == []
    figures = matrix_report.by_row(matrix_report.read(tmp_path))["T1"]
    assert (figures.cases, figures.again) == (10, 4)


def test_what_no_row_has_is_counted_apart(report, tmp_path, capsys):
    assert report(main=GOOD + case("test_other", file="test_c")) == []
    assert matrix_report.by_row(matrix_report.read(tmp_path))[""].cases == 1
    matrix_report.show(matrix_report.read(tmp_path), "short")
    assert "test_c.py: 1 cases" in capsys.readouterr().out


SKIP = '<skipped type="pytest.skip" message="{}">where</skipped>'
WRONG = {
    "no test": ("", ["no test has run"]),
    "too few": (
        case("test_b[x]", properties(cases=9, calls_cpu=1, calls_triton=1)),
        ["T1: 9 cases, 10 are asked for"],
    ),
    "failed, which is no case": (
        case("test_b[x]", properties(cases=10, calls_cpu=1, calls_triton=1))
        + case("test_b[z]", '<failure message="not so"/>'),
        ["test_a.py::test_b[z] failed in main: not so"],
    ),
    "an error behind a test that passed": (
        case("test_b[x]", properties(cases=10, calls_cpu=1, calls_triton=1) + "<error/>"),
        ["T1: 0 cases, 10 are asked for", "test_a.py::test_b[x] failed in main: "],
    ),
    "expected to fail": (
        GOOD + case("test_z", '<skipped type="pytest.xfail" message="some day"/>'),
        ["test_a.py::test_z failed in main: some day"],
    ),
    "no reason": (
        GOOD + case("test_z", SKIP.format("unconditional skip")),
        ["test_a.py::test_z was skipped in main without a reason"],
    ),
    "a backend did nothing": (
        case("test_b[x]", properties(cases=10, calls_triton=1)),
        ["no kernel of cpu has run"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_run_that_proves_too_little_is_told(report, name):
    text, expected = WRONG[name]
    assert report(main=text) == expected


def test_a_skip_with_a_reason_is_listed_and_is_no_case(report, tmp_path, capsys):
    assert report(main=GOOD + case("test_b[z]", SKIP.format("needs a GPU"))) == []
    matrix_report.show(matrix_report.read(tmp_path), "short")
    assert "1 skipped: needs a GPU" in capsys.readouterr().out


def test_a_long_run_is_asked_for_more(report):
    assert report("long", main=GOOD) == ["T1: 10 cases, 20 are asked for"]


@pytest.mark.parametrize("run", ["short", "long"])
def test_a_long_run_is_written_to_the_page(report, run, tmp_path, monkeypatch, capsys):
    markers = [f"<!-- {edge}:{name} -->" for name in ("rows", "long-run") for edge in EDGES]
    page = tmp_path / "page.md"
    page.write_text("\n".join(["kept", *markers, "kept"]))
    monkeypatch.setattr(matrix_report, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["matrix_report.py", run, str(tmp_path)])
    report(main=GOOD)
    assert matrix_report.main() == (1 if run == "long" else 0)
    told = capsys.readouterr().out
    lines = page.read_text().splitlines()
    assert lines[0] == lines[-1] == "kept"
    assert "| T1 | one | 10 | 20 | - | [test_a](../tests/test_a.py): b |" in lines
    if run == "short":
        assert lines[-3:-1] == markers[2:], "of a long run alone"
        assert "every row has what is asked for" in told
        return
    assert told.rstrip().endswith("T1: 10 cases, 20 are asked for")
    assert "| T1 | 20 | 10 | - | 0 | - |" in lines
    assert any("10 cases, 0 failed, 0 skipped" in line and "commit" in line for line in lines)


PLUGIN = """
import pytest, cases
def test_many(cases_checked):
    cases_checked(3)
    cases_checked(4)
def test_kernel():
    case = cases.groups()["S4"][-1]
    for _ in range(2):
        cases.run("reference", *cases.make_inputs(case), **case.settings)
def test_none(): pytest.skip("for a reason")
"""


def test_what_tests_say_arrives(tmp_path, python):
    """Through the real fixtures and pytest's own junit file, with workers beside each other."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(PLUGIN)
    arguments = ("-q", "-p", "no:cacheprovider", "-c", "/dev/null", "-n", "1")
    done = python("-m", "pytest", *arguments, f"--junitxml={tmp_path}/a.xml", str(tmp_path))
    assert done.returncode == 0, done.stdout
    many, kernel, none = sorted(matrix_report.read(tmp_path), key=lambda r: -r.cases + r.seconds)
    found = {r.test.rpartition("::")[2]: r for r in (many, kernel, none)}
    assert found["test_many"].cases == 7 and not found["test_many"].calls
    assert found["test_kernel"].cases == 1 and found["test_kernel"].calls == {"reference": 2}
    assert (found["test_none"].outcome, found["test_none"].reason) == ("skipped", "for a reason")
