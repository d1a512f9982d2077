"""Tables of text, for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.text import Text

LISTED = 60
"""Rows that `Table.of` keeps."""


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
        """A table of anything, cut to LISTED rows with a last one that says how many there are."""
        cells = [[str(cell) for cell in row] for row in rows[:LISTED]]
        if len(rows) > LISTED:
            cells.append([f"… {len(rows) - LISTED} more", *[""] * (len(header) - 1)])
        return cls(title, header, cells)

    def drawn(self) -> rich.table.Table:
        """The table for a console; no text is taken for markup."""
        drawn = rich.table.Table(title=Text(self.title), title_justify="left", title_style="italic")
        for heading in self.header:
            drawn.add_column(Text(heading))
        for row in self.rows:
            drawn.add_row(*map(Text, row[: len(self.header)]))
        return drawn
