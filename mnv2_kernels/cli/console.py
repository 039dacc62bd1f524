"""What every command shares: tables, progress, files that it writes, and the error that ends it."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from ..ops.optional import require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class CannotRun(Exception):
    """The command cannot be carried out; the sentence says why."""


def console() -> "Console":
    """A console for tables: as wide as the terminal, 120 columns where there is none."""
    require("rich")
    from rich.console import Console

    # Names and messages may have brackets, which are no styles.
    return Console(markup=False, width=None if sys.stdout.isatty() else 120)


def table(*headings: str, title: str | None = None, caption: str | None = None) -> "Table":
    """An empty table: words in the columns whose heading begins with a <, numbers in the others."""
    require("rich")
    from rich.table import Table

    made = Table(title=title, caption=caption)
    for heading in headings:
        justify = "left" if heading.startswith("<") else "right"
        made.add_column(heading.removeprefix("<"), justify=justify)
    return made


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done, and with the function given how far it is: on a terminal alone."""
    require("rich")
    from rich.console import Console
    from rich.text import Text

    # On stderr, since stdout may be read by a program.
    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        yield lambda done: None
        return
    # Twice a second, so that drawing the spinner does not disturb what is being timed.
    with terminal.status(Text(what), refresh_per_second=2) as status:
        yield lambda done: status.update(Text(f"{what}: {done}"))


def check_can_write(path: Path | None, option: str) -> None:
    """CannotRun, before anything is measured, where a file could not be written."""
    if path is None:
        return
    if not path.parent.is_dir() or path.is_dir():
        raise CannotRun(f"{option} must be a file in a folder that exists, got {path}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CannotRun(f"{option} must be a file that can be written, got {path}")


def write_json(path: Path | None, document: Mapping[str, object]) -> None:
    """Write a JSON object where a file was asked for, and say so."""
    if path is not None:
        path.write_text(dumps(document, indent=2) + "\n")
        print(f"wrote {path}")
