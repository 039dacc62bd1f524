"""Which models gain, from the rows of suite `models`."""

from ..harness import Row
from ..markdown import markdown, percent


def model_table(rows: list[Row]) -> str:
    """One line a model, the fastest first: blocks fused, speed, and memory beside eager's."""
    models: dict[str, dict[str, Row]] = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["provider"]] = row
    complete = [found for found in models.values() if {"eager", "folded", "fused"} <= set(found)]
    body = []
    for found in sorted(complete, key=lambda found: -found["fused"]["speedup"]["folded"]):
        fused, eager, planned = (found.get(name) for name in ("fused", "eager", "planned"))
        cells = [fused["model"], f"{fused['blocks_fused']} of {fused['blocks']}"]
        cells += [f"{fused['speedup'][other]:.2f}x" for other in ("eager", "folded")]
        cells.append("-" if planned is None else f"{planned['speedup']['folded']:.2f}x")
        cells += [
            "-" if row is None else percent(row["peak_bytes"] / eager["peak_bytes"])
            for row in (fused, planned)
        ]
        body.append(cells)
    head = ["model", "blocks fused", "fused over eager", "over folded", "plan over folded"]
    return markdown([*head, "memory of fused, of eager's", "of plan"], body)
