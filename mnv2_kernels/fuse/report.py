"""What `explain` found, as data, as text and as a table of a notebook."""

from collections import Counter
from dataclasses import dataclass
from html import escape
from typing import Literal

from ..block.config import BlockConfig

State = Literal["fused", "plain", "fusable", "declined"]


@dataclass(frozen=True)
class Row:
    """One block of a model.

    state: "fused" runs in one pass; "plain" would if it could, now runs layer by layer;
    "fusable" is an original that `fuse` would replace; "declined" looks like such a block but
    cannot be fused exactly. reason: why it does not run fused. backend: the name of what runs
    after `fuse`, None for the plain layers. input_hw, bytes_saved (expansion and depthwise output
    of one image; the expansion alone with a squeeze-excite) and kernel (which one of the backend
    "cuda") are known with an input shape only.
    """

    name: str
    state: State
    config: BlockConfig | None = None
    backend: str | None = None
    reason: str | None = None
    input_hw: tuple[int, int] | None = None
    bytes_saved: int | None = None
    kernel: str | None = None


class Report(tuple[Row, ...]):
    """The rows in the order of the model; prints as a table and a summary.

    outside: names of the depthwise convolutions that are in none of these blocks.
    runs_as_one: whether calls for inference on a CPU run as one. why_no_plan: why `plan` would
    refuse the model, None where it would not.
    """

    outside: tuple[str, ...] = ()
    runs_as_one: bool = False
    why_no_plan: str | None = None

    @property
    def summary(self) -> str:
        """What the rows come to, and what a user can do, in a few sentences."""
        fused = sum(row.state == "fused" for row in self)
        fusable = sum(row.state == "fusable" and row.reason is None for row in self)
        declined = sum(row.state == "declined" for row in self)
        sentences = [_count(fused, fusable, declined, len(self))]
        if self.outside:
            names = ", ".join(self.outside[:3]) + (", ..." if len(self.outside) > 3 else "")
            count = len(self.outside)
            plural = "s are" if count > 1 else " is"
            sentences.append(f"{count} depthwise convolution{plural} in no such block: {names}.")
        if not fused and not fusable:
            return " ".join(sentences)
        if self.runs_as_one:
            sentences.append("Inference on a CPU runs as one call.")
        if self.why_no_plan is None:
            sentences.append("The model has a plan: `plan(model, input_shape)`.")
        else:
            sentences.append(f"The model has no plan: {self.why_no_plan}.")
            sentences.append("Its other layers may be faster where model and x are channels_last.")
        return " ".join(sentences)

    @property
    def bytes_saved(self) -> int:
        """Bytes of all expanded and depthwise tensors of one image, as far as they are known."""
        return sum(row.bytes_saved or 0 for row in self)

    def __str__(self) -> str:
        if not self:
            return self.summary
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*table, *self._notes(), self.summary])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        heading, *lines = ([escape(cell) for cell in line] for line in self._lines())
        rows = ["<th>" + "</th><th>".join(heading) + "</th>"]
        rows += ["<td>" + "</td><td>".join(line) + "</td>" for line in lines]
        table = "".join(f"<tr>{row}</tr>" for row in rows) if self else ""
        said = "".join(f"<p>{escape(line)}</p>" for line in (*self._notes(), self.summary))
        return f"<table>{table}</table>{said}" if self else said

    def _lines(self) -> list[tuple[str, ...]]:
        """The cells of the table, its heading first."""
        numbers = {reason: str(i) for i, reason in enumerate(self._reasons(), 1)}
        lines = [("block", "state", "shape", "input", "backend", "saved", "why not")]
        lines += [(*_cells(row), f"[{numbers[row.reason]}]" if row.reason else "") for row in self]
        if self.bytes_saved:
            lines.append(("all", "", "", "", "", _bytes(self.bytes_saved), ""))
        return lines

    def _reasons(self) -> Counter[str]:
        return Counter(row.reason for row in self if row.reason is not None)

    def _notes(self) -> list[str]:
        """Every reason once, with how many blocks have it."""
        return [
            f"[{i}] {count} block{'s' * (count > 1)}: {reason}"
            for i, (reason, count) in enumerate(self._reasons().items(), 1)
        ]


def _count(fused: int, fusable: int, declined: int, blocks: int) -> str:
    """How many blocks run fused or could."""
    if not blocks:
        return "No inverted residual block was found, so `fuse` changes nothing."
    if declined == blocks:
        return f"0 of {blocks} blocks can run fused, so `fuse` changes nothing."
    if not fused and fusable:
        return f"{fusable} of {blocks} blocks can run fused: `fuse(model)`."
    more = f", {fusable} more can: `fuse(model)`." if fusable else "."
    return f"{fused} of {blocks} blocks run fused{more}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name or "(the model)",
        row.state,
        row.config.name + (" residual" * row.config.residual) if row.config else "",
        "x".join(map(str, row.input_hw)) if row.input_hw else "",
        f"{row.backend}: {row.kernel}" if row.kernel else row.backend or "",
        "" if row.bytes_saved is None else _bytes(row.bytes_saved),
    )


def _bytes(number: int) -> str:
    return f"{number / 2**10:.1f} KiB" if number < 2**20 else f"{number / 2**20:.2f} MiB"
