r"""Cuts text by the patterns with a name, through `re` of the standard library.

`re` knows no `\p{L}`, so letters, numbers and white space are spelled out, from the same tables for everybody. It is
fast only with the characters below U+10000; others are cut as one of those that is of their kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

from moeport.tokenizers.unicode_properties import LETTER, NUMBER, SPACE, properties

STAND_INS = {LETTER: "\u0101", NUMBER: "\u00b2", 0: "\ufffd"}
"""A letter, a number and a symbol that no pattern names."""

_KINDS = {r"\p{L}": LETTER, r"\p{N}": NUMBER, r"\s": SPACE}
_TOKEN = re.compile(r"\\p\{\w\}|\\.|[^\\]", re.DOTALL)
_WIDE = re.compile("[\U00010000-\U0010ffff]")
_ASCII, _BELOW = 0x80, 0x10000


def category_splitter(pattern: str) -> Callable[[str], list[str]]:
    r"""The function that cuts a text; its pieces make up the text.

    Args:
        pattern: a regular expression without groups whose matches make up every text, and whose only properties are
            `\p{L}`, `\p{N}`, `\s` and, outside brackets, `\S`.
    """

    def split(text: str) -> list[str]:
        if text.isascii():
            return _compiled(pattern, _ASCII).findall(text)
        if not _WIDE.search(text):
            return _compiled(pattern, _BELOW).findall(text)
        lengths = map(len, _compiled(pattern, _BELOW).findall(_narrowed(text)))
        return [text[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]

    return split


@lru_cache
def _compiled(pattern: str, limit: int) -> re.Pattern[str]:
    """The pattern for texts whose characters are below the limit."""
    parts: list[str] = []
    inside = False
    for token in _TOKEN.findall(pattern):
        inside = token == "[" or (inside and token != "]")
        if token in _KINDS:
            spelled = _ranges(_KINDS[token], limit)
            parts.append(spelled if inside else f"[{spelled}]")
        else:
            parts.append(f"[^{_ranges(SPACE, limit)}]" if token == r"\S" else token)
    return re.compile("".join(parts))


@lru_cache
def _ranges(kind: int, limit: int) -> str:
    """All characters of a kind below the limit, as they stand between brackets."""
    edges = np.diff((properties()[:limit] & kind).astype(bool), prepend=False, append=False).nonzero()[0].tolist()
    return "".join(rf"\u{start:04x}-\u{end - 1:04x}" for start, end in zip(edges[::2], edges[1::2], strict=True))


def _narrowed(text: str) -> str:
    """The text with another character of the same kind in place of each from U+10000 on."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).copy()
    wide = codes >= _BELOW
    kinds = properties()[codes[wide]] & (LETTER | NUMBER)
    codes[wide] = np.select([kinds == kind for kind in STAND_INS], [ord(character) for character in STAND_INS.values()])
    return codes.tobytes().decode("utf-32-le", "surrogatepass")
