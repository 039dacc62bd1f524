"""What the pages name is there: files behind links, and tests behind promises."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "tests")
PAGES = [ROOT / "README.md"]
PAGES += sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def assert_test_exists(file: str, name: str) -> None:
    assert name.startswith("test_") and name in functions(ROOT / file), f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_promises_are_kept_by_tests_that_exist():
    """Every point of "What you can rely on" names at least one."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## What you can rely on\n")[2].partition("\n## ")[0]
    points = section.split("\n- ")[1:]
    assert len(points) >= 12
    for point in points:
        links = re.findall(r"\[(\w+)\]\((tests/\w+/test_\w+\.py)\)", " ".join(point.split()))
        assert links, point
        for name, file in links:
            assert_test_exists(file, name)


def test_every_way_names_a_test_that_exists():
    """In the table of docs/ways.md."""
    table = (ROOT / "docs" / "ways.md").read_text()
    rows = [
        line for line in table.splitlines() if line.startswith("| ") and "| kept by" not in line
    ]
    named = [re.fullmatch(r"\| .+ \| .+ \| (tests/\w+/\w+\.py)::(\w+) \|", row) for row in rows]
    assert all(named), [row for row, match in zip(rows, named, strict=True) if not match]
    assert len(named) > 40
    for match in named:
        assert_test_exists(*match.groups())
