"""Tables in Markdown."""

import re

MIB = 2**20


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table with numbers to the right; empty without rows."""
    if not body:
        return ""
    numbers = [re.fullmatch(r"-|[\d.]+[%x]?( \([\d.%x, ]+\))?", cell) for cell in body[0]]
    ruler = ["---:" if number else "---" for number in numbers]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ruler, *body])
