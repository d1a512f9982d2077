"""The consoles that everything is printed on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

PLAIN_WIDTH = 200
"""Characters per line where the output is not a terminal."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""The text with control characters written out, such as `\x1b`; tabs and ends of lines stay.

    Names and texts come from files, and generated text from a model: what they contain must not move the cursor,
    change colours or reverse the reading order.
    """
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


class PlainConsole(Console):
    """A console that takes no markup from strings and writes out control characters.

    Args:
        options: of `rich.console.Console`.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"highlight": False, "markup": False, "emoji": False} | options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of `renderable`, each with a text that is safe to print."""
        for segment in super().render(renderable, options):
            if segment.control or not _CONTROL.search(segment.text):
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def wide_console() -> PlainConsole:
    """A console that does not truncate the columns of tables written to a file or a log."""
    console = PlainConsole()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console
