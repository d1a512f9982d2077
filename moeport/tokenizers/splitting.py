"""Cuts text into pre-tokens: the matches of a pattern, and what lies between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import numpy as np
from tokenizers import Regex, pre_tokenizers

from moeport.errors import DataError, choices
from moeport.tokenizers.category_splitting import STAND_INS, category_splitter
from moeport.tokenizers.definition import expression
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.unicode_properties import LETTER, NUMBER, properties

_SURROGATES = re.compile("[\ud800-\udfff]")


def check_pattern(pattern: str) -> None:
    """Refuse a pattern that cannot cut text, and letters and digits alone, which are a misspelled name.

    Raises:
        DataError: what is wrong with it.
    """
    if pattern not in PATTERNS and re.fullmatch(r"[\w-]*", pattern):
        raise DataError(f"pattern {pattern!r}: no such name; {choices(pattern, PATTERNS)}")
    splitter(pattern)


def splitter(pattern: str) -> Callable[[str], list[str]]:
    """The function that cuts a text by a pattern; its pieces make up the text.

    Letters and numbers are those of `properties`, whatever the library knows. A surrogate that stands alone is neither,
    nor white space.

    Args:
        pattern: a name from `PATTERNS`, or a regular expression.

    Raises:
        DataError: the pattern is not a regular expression.
    """
    if expression(pattern) in PATTERNS.values():
        return category_splitter(expression(pattern))
    try:
        import regex
    except ImportError:
        return _with_tokenizers(expression(pattern))
    try:
        compiled = regex.compile(expression(pattern))
    except regex.error as error:
        raise DataError(f"pattern {pattern!r}: {error}; expected a regular expression") from error

    def split(text: str) -> list[str]:
        if not (text.isascii() or _disputed().keys().isdisjoint(set(text))):  # a hundred times as fast as a search
            known = text.translate({ord(character): instead for character, instead in _disputed().items()})
            return list(_pieces(text, (match.span() for match in compiled.finditer(known))))
        if not compiled.groups:
            words: list[str] = compiled.findall(text)
            if sum(map(len, words)) == len(text) and "" not in words:
                return words
        return list(_pieces(text, (match.span() for match in compiled.finditer(text))))

    return split


@lru_cache(maxsize=1)
def _disputed() -> dict[str, str]:
    """The characters that `regex` takes for another kind than `properties` does, and what to cut in their place."""
    import regex

    places = np.array([*range(0xD800), *range(0xE000, 0x110000)])
    every = "".join(map(chr, places))
    found = np.zeros(0x110000, np.uint8)
    for kind, bit in ((r"\p{L}+", LETTER), (r"\p{N}+", NUMBER)):
        for match in regex.finditer(kind, every):
            found[places[match.start() : match.end()]] |= bit
    right = properties() & (LETTER | NUMBER)
    return {chr(code): STAND_INS[int(right[code])] for code in np.flatnonzero(found != right)}


def _with_tokenizers(pattern: str) -> Callable[[str], list[str]]:
    """The same by the tokenizers library, which is always installed, at a quarter of the speed."""
    try:
        isolate = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # the library raises no other class
        raise DataError(f"pattern {pattern!r}: {error}; expected a regular expression") from error

    def split(text: str) -> list[str]:
        cut = isolate.pre_tokenize_str(_SURROGATES.sub("\ufffd", text))
        return list(_pieces(text, (span for _, span in cut)))

    return split


def _pieces(text: str, spans: Iterable[tuple[int, int]]) -> Iterator[str]:
    """The spans of a text and the gaps between them, without empty ones."""
    place = 0
    for start, end in spans:
        if start > place:
            yield text[place:start]
        if end > start:
            yield text[start:end]
        place = end
    if place < len(text):
        yield text[place:]
