"""Every way that docs/ways.md lists has the test that it names."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_way_names_a_test_that_exists():
    table = (ROOT / "docs" / "ways.md").read_text()
    rows = [
        line for line in table.splitlines() if line.startswith("| ") and "| kept by" not in line
    ]
    named = [re.fullmatch(r"\| .+ \| .+ \| (tests/\w+/\w+\.py)::(\w+) \|", row) for row in rows]
    assert all(named), [row for row, match in zip(rows, named, strict=True) if not match]
    assert len(named) > 40
    functions = {}
    for match in named:
        path, name = match.groups()
        if path not in functions:
            tree = ast.parse((ROOT / path).read_text())
            functions[path] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert name.startswith("test_") and name in functions[path], f"{path} has no {name}"
