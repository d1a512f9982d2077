"""How far a command has come that reads or writes much."""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_UPDATES, SECONDS_BETWEEN_LINES = 0.1, 15.0
"""Between changes of the bar on a terminal, and between lines where standard error is none."""


class FileProgress:
    """How much has been read or written, on standard error: on a terminal a bar, otherwise a line now and then."""

    def __init__(self) -> None:
        from moeport.pages.console import PlainConsole

        self.console = PlainConsole(stderr=True)
        self.live = self._bar() if self.console.is_terminal else None
        self.last = time.monotonic()

    def __enter__(self) -> "FileProgress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def add(self, name: str, done: int, total: int) -> None:
        """Show how much is done.

        Args:
            name: what is read or written.
            done: bytes that are.
            total: of how many; 0: not known.
        """
        self.show(_line(name, done, total), done, total)

    def show(self, line: str, done: int = 0, total: int = 0) -> None:
        """Show a line, and how far the bar reaches."""
        now = time.monotonic()
        if now - self.last < (SECONDS_BETWEEN_UPDATES if self.live else SECONDS_BETWEEN_LINES):
            return
        self.last = now
        if self.live:
            self.live.update(self.task, completed=done, total=total or None, description=line)
        else:
            self.console.print(line, soft_wrap=True)

    def _bar(self) -> "Progress":
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        columns: list[Any] = [
            BarColumn(bar_width=None, table_column=Column(width=16)),
            TextColumn("{task.description}", markup=False),
        ]
        live = Progress(*columns, console=self.console, refresh_per_second=4, transient=True)
        self.task = live.add_task("reading", total=None)
        return live


def _line(name: str, done: int, total: int) -> str:
    if not total:
        return f"{done / 1e9:.2f} GB  {name}"
    return f"{done / total:4.0%}  {done / 1e9:.2f} of {total / 1e9:.2f} GB  {name}"


def counted(done: int, total: int, what: str) -> str:
    """A line for what is counted in pieces, such as `  50%  1,000 of 2,000 tokens`."""
    return f"{done / total:4.0%}  {done:,} of {total:,} {what}"
