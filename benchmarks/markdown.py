"""Tables in Markdown, and the places in a file that they go to."""

import re
from collections.abc import Mapping

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


def fill(text: str, contents: Mapping[str, str]) -> str:
    """`text` with the lines between the markers of every name replaced.

    Raises:
        ValueError: a begin marker without its end.
    """
    for name in re.findall(r"<!-- begin:([\w-]+) -->", text):
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        before, _, rest = text.partition(begin)
        old, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"fill: text must hold {end} after {begin}, got none")
        new = f"\n{contents[name]}\n" if name in contents else old
        text = before + begin + new + end + after
    return text
