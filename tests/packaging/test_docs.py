"""The pages are true: links lead somewhere, snippets run, generated parts are up to date, and the
tests that promises name exist."""

import ast
import doctest
import re
from functools import cache
from pathlib import Path

import pytest
import torch

import mnv2_kernels as mk
from benchmarks.report.pages import pages
from mnv2_kernels.ops import extension
from mnv2_kernels.recognizers import trace

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "tests")
PAGES = sorted(ROOT.glob("*.md"))
PAGES += sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
needs_extension = pytest.mark.skipif(
    extension.missing is not None, reason="needs the compiled extension"
)


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def assert_test_exists(path: Path, name: str) -> None:
    assert name.startswith("test_") and name in functions(path), f"{path} has no {name}"


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def snippets(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|pycon)\n(.*?)^```$", page.read_text(), re.M | re.S)


@needs_extension
@pytest.mark.parametrize("page", [*filter(snippets, PAGES)], ids=lambda page: page.name)
def test_snippets_run(page, monkeypatch, one_thread):
    """One after the other, as pasted. Examples with results share only what is above them."""
    monkeypatch.setattr(trace, "OPERATIONS", dict(trace.OPERATIONS))
    names: dict[str, object] = {}
    wrong: list[str] = []
    for kind, code in snippets(page):
        if kind == "python":
            exec(compile(code, str(page), "exec"), names)
        else:
            example = doctest.DocTestParser().get_doctest(code, names, page.name, None, None)
            doctest.DocTestRunner().run(example, out=wrong.append)
    assert not wrong, "".join(wrong)


@needs_extension
def test_readme_computes_what_it_says(one_thread):
    names: dict[str, object] = {}
    for _, code in snippets(ROOT / "README.md"):
        exec(code, names)
    with torch.no_grad():
        expected = names["model"](names["x"])
        for computed in (names["fused"], names["plan"]):
            torch.testing.assert_close(computed(names["x"]), expected, rtol=1e-4, atol=1e-5)


def test_generated_parts_are_up_to_date():
    """`python -m benchmarks.report` would write nothing new."""
    assert [path.name for path, text in pages().items() if path.read_text() != text] == []


def test_every_public_name_has_an_example():
    entries = (ROOT / "docs" / "api.md").read_text().split("\n## `")[1:]
    shown = {entry.partition("`")[0] for entry in entries if "```pycon" in entry}
    assert shown >= {f"mk.{name}" for name in mk.__all__}


def test_readme_is_short_and_begins_with_figures():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert re.search(r"\d ms .*`mk.fuse`", "\n".join(lines[:25]))


def test_promises_are_kept_by_tests_that_exist():
    """Every point of docs/guarantees.md but its limits names at least one."""
    page = ROOT / "docs" / "guarantees.md"
    points = page.read_text().partition("\n## Limits")[0].split("\n- ")[1:]
    assert len(points) >= 12
    for point in points:
        links = re.findall(r"\[(\w+)\]\((\.\./tests/\w+/test_\w+\.py)\)", " ".join(point.split()))
        assert links, point
        for name, file in links:
            assert_test_exists(page.parent / file, name)


def test_every_way_names_a_test_that_exists():
    """In the table of docs/pytorch.md."""
    table = (ROOT / "docs" / "pytorch.md").read_text()
    rows = [
        line for line in table.splitlines() if line.startswith("| ") and "| kept by" not in line
    ]
    named = [re.fullmatch(r"\| .+ \| .+ \| (tests/\w+/\w+\.py)::(\w+) \|", row) for row in rows]
    assert all(named), [row for row, match in zip(rows, named, strict=True) if not match]
    assert len(named) > 40
    for match in named:
        assert_test_exists(ROOT / match[1], match[2])
