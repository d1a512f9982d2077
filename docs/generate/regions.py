"""Generated regions of a file.

A region begins after a line with `generated: NAME (make generate)` and ends before a line with `end of NAME`; both are
comments of the file's own kind.
"""

import re
from collections.abc import Callable, Mapping


def filled(text: str, pieces: Mapping[str, Callable[[], str]]) -> str:
    """The text of a file with each region renewed.

    Raises ValueError where a region is missing or has no piece.
    """
    found = re.findall(r"generated: (.+) \(make generate\)", text)
    if sorted(found) != sorted(pieces):
        raise ValueError(f"the regions are {sorted(found)}; expected {sorted(pieces)}")
    for name, piece in pieces.items():
        region = rf"(generated: {re.escape(name)} \(make generate\).*\n)(?s:.*?)(.*end of {re.escape(name)}\b)"
        match = re.search(region, text)
        if match is None:
            raise ValueError(f"the region {name} has no end")
        text = text[: match.end(1)] + piece().strip("\n") + "\n" + text[match.start(2) :]
    return text
