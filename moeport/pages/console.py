"""The console that wide tables are printed on."""

from __future__ import annotations

from rich.console import Console

PLAIN_WIDTH = 200
"""Characters per line where the output is not a terminal."""


def wide_console() -> Console:
    """A console that does not truncate the columns of tables written to a file or a log."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console
