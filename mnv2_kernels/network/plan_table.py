"""A plan as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from .program import Block, Layer, Pointwise, Pool, Shape, Stem


@dataclass(frozen=True)
class Row:
    """One line of a printed plan.

    name: in the model. rows: of the result that are in memory at a time, None for all. offset: of
    the result in the arena, bytes; None where it is not there. nbytes: of the rows in memory.
    """

    name: str
    layer: str
    shape: Shape
    rows: int | None
    offset: int | None
    nbytes: int


def table(rows: Sequence[Row]) -> str:
    """The rows under a heading, in columns."""
    lines = [("step", "layer", "result", "rows in memory", "arena offset", "bytes")]
    for row in rows:
        where = "result" if row is rows[-1] else "streams"
        lines.append(
            (
                row.name or "(the model)",
                row.layer,
                "x".join(map(str, row.shape)),
                "all" if row.rows is None else str(row.rows),
                f"{row.offset:,}" if row.offset is not None else where,
                f"{row.nbytes:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def describe_layer(layer: Layer) -> str:
    """A step in a few words."""
    match layer:
        case Stem():
            return f"3x3 convolution, {layer.in_channels} to {layer.out_channels} channels"
        case Block():
            return f"block {layer.config.name}" + " residual" * layer.config.residual
        case Pool():
            convolution = "" if layer.weight is None else "1x1 convolution and "
            return f"{convolution}mean, {layer.in_channels} to {layer.out_channels} channels"
        case Pointwise():
            return f"1x1 convolution, {layer.in_channels} to {layer.out_channels} channels"
    return f"linear, {layer.in_features} to {layer.out_features}"
