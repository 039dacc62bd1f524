"""What every command shares: the console it prints tables on, and the error that ends it."""

import sys

from rich.console import Console


class CannotRun(Exception):
    """The command cannot be carried out; the sentence says why."""


def console() -> Console:
    """A console for tables: as wide as the terminal, 120 columns where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=120)
