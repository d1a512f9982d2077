"""Where a text that goes on can be cut, so that its pre-tokens are those of the whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

BLOCK = 2**20
"""Bytes of a stream that are encoded at once."""

REACH = 64
"""Bytes after a pre-token and the white space behind it that decide where it ends, in the patterns with a name: they
look at white space, and at the two letters of a contraction."""

REACH_OF_OTHERS = 2**16
"""The same for other patterns, of which nothing is known."""

_WINDOW = 2**10
_NEW_LINE = re.compile(rb"\n(?=[A-Za-z])")


def as_bytes(text: str | bytes) -> bytes:
    """UTF-8; surrogates that stand alone become the three bytes that UTF-8 would give them."""
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError:
            return text.encode("utf-8", "surrogatepass")
    return bytes(memoryview(text))  # refuses a number, of which bytes() makes that many zeros


def as_text(data: bytes) -> str:
    """Text of which each byte that is not UTF-8 is a character of its own, a surrogate that stands alone."""
    return data.decode("utf-8", "surrogateescape")


def last_certain(data: bytes, reach: int) -> int:
    """The place up to which the ends of pre-tokens are the same, however the text goes on; 0: there is none.

    It is the last character before the reach that is not white space: no pre-token that ends before it depends on what
    follows.
    """
    end = len(data) - reach
    while end > 0 and data[end] & 0xC0 == 0x80:  # within a character
        end -= 1
    while end > 0:
        window = as_text(data[max(end - _WINDOW, 0) : end])
        stripped = window.rstrip()
        if len(stripped) > 4:  # the window may begin within a character, of which three bytes can be left
            return end - len(window[len(stripped) - 1 :].encode("utf-8", "surrogateescape"))
        end -= min(_WINDOW, end)
    return 0


def blocks(chunks: Iterable[str | bytes]) -> Iterator[bytes]:
    """The bytes of a stream, in pieces of `BLOCK` to twice as many (the last may be shorter)."""
    waiting: list[bytes] = []
    size = 0
    for chunk in chunks:
        data = as_bytes(chunk)
        for start in range(0, len(data), BLOCK):
            waiting.append(data[start : start + BLOCK])
            size += len(waiting[-1])
            if size >= BLOCK:
                yield b"".join(waiting)
                waiting, size = [], 0
    yield b"".join(waiting)


def segments(text: bytes) -> Iterator[tuple[bytes, int]]:
    """A text in parts of about `BLOCK` bytes that can be encoded apart, each with what follows it and its own length.

    In every pattern with a name, a pre-token ends between a line end and a letter, whatever stands around them.
    """
    start = 0
    while start < len(text):
        found = _NEW_LINE.search(text, start + BLOCK)
        end = found.start() + 1 if found else len(text)
        yield text[start : end + REACH], end - start
        start = end
