"""Patterns of pre-tokens as small programs that compiled code runs; the rest are left to a regular-expression library.

A program is a list of ways to match, tried in order. A way is a list of runs: repeated characters of a set, as many as
possible first. That covers the patterns with a name, and most others in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import product

import numpy as np

from moeport.tokenizers.unicode_properties import LETTER, NUMBER, SPACE, properties

MAXIMUM = 2**31 - 1
"""A run without an upper limit."""

_PROPERTIES = {r"\p{L}": LETTER, r"\p{N}": NUMBER, r"\s": SPACE}
_ESCAPES = {r"\r": "\r", r"\n": "\n", r"\t": "\t"}
_OTHER_CASES = {"s": "\u017f", "k": "\u212a"}
"""Characters beside the capital that match a letter where case is ignored."""
_QUANTIFIERS = {"?": (0, 1), "*": (0, MAXIMUM), "+": (1, MAXIMUM)}


class UnsupportedError(Exception):
    """The pattern has something that no program expresses."""


@dataclass(frozen=True)
class Set:
    """A set of characters: those with a property and those named, or all others."""

    properties: int
    characters: frozenset[str]
    others: bool = False

    def has(self, properties: int, character: str | None) -> bool:
        """Whether a character with these properties is in it; the character is None where no pattern names it."""
        return (bool(self.properties & properties) or character in self.characters) != self.others


@dataclass(frozen=True)
class Run:
    """Characters of a set: at least `least`, at most `most`, as many as possible; `keeps` never gives any back."""

    of: Set
    least: int = 1
    most: int = 1
    keeps: bool = False


@dataclass(frozen=True)
class Way:
    """Runs that follow one another; `before` is what must follow, unless the text ends there."""

    runs: tuple[Run, ...]
    before: Set | None = None


@dataclass(frozen=True)
class Program:
    """The ways to match as arrays, and the class of every code point. Sets are masks of classes.

    Args:
        classes: uint8 (0x110000), class of a code point.
        first: uint64 (ways), classes with which the way can begin.
        before: uint64 (ways), classes one of which must follow; 0: anything.
        begins: int64 (ways + 1), place of the first run of the way.
        sets, least, most, keeps: uint64 and int64 (runs).
        symbol: class of a byte that is not UTF-8.
    """

    classes: np.ndarray
    first: np.ndarray
    before: np.ndarray
    begins: np.ndarray
    sets: np.ndarray
    least: np.ndarray
    most: np.ndarray
    keeps: np.ndarray
    symbol: int


@lru_cache(maxsize=16)
def program_of(expression: str) -> Program | None:
    """The program of a regular expression; None where there is none."""
    try:
        ways = _Parser(expression).ways()
        for way in ways:
            _check(way)
    except UnsupportedError:
        return None
    named = sorted({character for way in ways for a_set in _sets(way) for character in a_set.characters})
    return _arrays(ways, named) if len(named) < 48 else None


class _Parser:
    r"""Reads alternatives of literals, sets, quantifiers, groups of alternatives and a closing (?!\S)."""

    def __init__(self, expression: str):
        self._rest = expression
        self._ignores_case = False

    def ways(self) -> list[Way]:
        found = self._alternatives()
        if self._rest:
            raise UnsupportedError(self._rest)
        return found

    def _alternatives(self) -> list[Way]:
        found = self._sequence()
        while self._take("|"):
            found += self._sequence()
        return found

    def _sequence(self) -> list[Way]:
        ways = [Way(())]
        while self._rest and self._rest[0] not in "|)":
            ways = [_joined(way, part) for way, part in product(ways, self._part())]
        return ways

    def _part(self) -> list[Way]:
        if self._take(r"(?!\S)"):
            return [Way((), Set(SPACE, frozenset()))]
        for opening, ignores_case in (("(?i:", True), ("(?:", False)):
            if self._take(opening):
                return self._group(ignores_case)
        a_set = self._set()
        least, most = self._quantifier()
        return [Way((Run(a_set, least, most, self._take("+")),))]

    def _group(self, ignores_case: bool) -> list[Way]:
        outer, self._ignores_case = self._ignores_case, ignores_case or self._ignores_case
        ways = self._alternatives()
        self._ignores_case = outer
        if not self._take(")"):
            raise UnsupportedError("a group that does not end")
        if self._take("?"):
            ways.append(Way(()))
        if self._rest[:1] in ("?", "*", "+", "{") and self._rest:
            raise UnsupportedError("a group that repeats")
        return ways

    def _set(self) -> Set:
        if not self._take("["):
            return self._one()
        others = self._take("^")
        members = []
        while not self._take("]"):
            members.append(self._one())
            if not self._rest or self._rest[0] == "-" or members[-1].others:
                raise UnsupportedError("a range, or a set within a set")
        together = reduce(lambda a, b: Set(a.properties | b.properties, a.characters | b.characters), members)
        return replace(together, others=others)

    def _one(self) -> Set:
        for text, has in _PROPERTIES.items():
            if self._take(text):
                return Set(has, frozenset())
        if self._take(r"\S"):
            return Set(SPACE, frozenset(), others=True)
        for text, character in _ESCAPES.items():
            if self._take(text):
                return self._literal(character)
        character, self._rest = self._rest[:1], self._rest[1:]
        if not character or character in r"\.^$()[]{}*+?|-&~#":
            raise UnsupportedError(character)
        return self._literal(character)

    def _literal(self, character: str) -> Set:
        if not self._ignores_case:
            return Set(0, frozenset(character))
        lower = character.lower()
        if not (character.isascii() and character.isalpha()):
            raise UnsupportedError("the other case of this character")
        return Set(0, frozenset({lower, lower.upper(), *_OTHER_CASES.get(lower, "")}))

    def _quantifier(self) -> tuple[int, int]:
        for text, limits in _QUANTIFIERS.items():
            if self._take(text):
                return self._greedy(limits)
        if not self._take("{"):
            return 1, 1
        inside, _, self._rest = self._rest.partition("}")
        least, comma, most = inside.partition(",")
        if not least.isdecimal() or not (most.isdecimal() or not most):
            raise UnsupportedError(inside)
        return self._greedy((int(least), int(most) if most else MAXIMUM if comma else int(least)))

    def _greedy(self, limits: tuple[int, int]) -> tuple[int, int]:
        if self._rest.startswith("?"):
            raise UnsupportedError("as few as possible")
        return limits

    def _take(self, text: str) -> bool:
        taken = self._rest.startswith(text)
        if taken:
            self._rest = self._rest[len(text) :]
        return taken


def _joined(way: Way, part: Way) -> Way:
    if way.before is not None:
        raise UnsupportedError("something after (?!\\S)")
    return Way(way.runs + part.runs, part.before)


def _check(way: Way) -> None:
    """Refuse ways that match nothing."""
    if not any(run.least for run in way.runs):
        raise UnsupportedError("a way to match nothing")


def _sets(way: Way) -> Iterator[Set]:
    yield from (run.of for run in way.runs)
    if way.before is not None:
        yield way.before


def _arrays(ways: Sequence[Way], named: Sequence[str]) -> Program:
    """Numbers the classes: 8 for the properties of unnamed characters, then one for each named character."""
    table = properties()
    kinds: list[tuple[int, str | None]] = [(bits, None) for bits in range(8)]
    classes = table.copy()
    for character in named:
        classes[ord(character)] = len(kinds)
        kinds.append((int(table[ord(character)]), character))

    def mask(a_set: Set) -> int:
        return sum(1 << number for number, kind in enumerate(kinds) if a_set.has(*kind))

    def first(way: Way) -> int:
        needed = next(number for number, run in enumerate(way.runs) if run.least)
        return reduce(int.__or__, (mask(run.of) for run in way.runs[: needed + 1]))

    runs = [run for way in ways for run in way.runs]
    return Program(
        classes,
        np.array([first(way) for way in ways], np.uint64),
        np.array([mask(way.before) if way.before else 0 for way in ways], np.uint64),
        np.cumsum([0, *(len(way.runs) for way in ways)]),
        np.array([mask(run.of) for run in runs], np.uint64),
        np.array([run.least for run in runs], np.int64),
        np.array([run.most for run in runs], np.int64),
        np.array([run.keeps for run in runs], np.int64),
        0,
    )
