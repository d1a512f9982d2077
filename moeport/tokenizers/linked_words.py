"""Words as linked symbols, in arrays: where pairs are, how often, and what a merge makes of their neighbours.

A pair comes into being when the newer of its two tokens is made, and from then on only loses places. So its places are
noted once, then, and those that still hold are picked out when somebody asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_END, _GONE = -1, -2  # symbols of the border between words, and of a place that was merged into the one before it
NUM_BYTES = 256


class Pairs(NamedTuple):
    """Pairs with the frequency that they had when they came into being."""

    lefts: np.ndarray
    rights: np.ndarray
    frequencies: np.ndarray


class _Noted(NamedTuple):
    """Places grouped by one of both symbols: those of `symbols[i]` are `places[starts[i] : starts[i + 1]]`."""

    symbols: np.ndarray
    starts: np.ndarray
    places: np.ndarray

    def of(self, symbol: int) -> np.ndarray:
        group = int(self.symbols.searchsorted(symbol))
        return self.places[self.starts[group] : self.starts[group + 1]]


class LinkedWords:
    """All words one after the other, a border between each two.

    Args:
        words: how often each word occurs; words without a pair may be left out.
    """

    def __init__(self, words: Mapping[bytes, int]):
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        occurs = np.fromiter(words.values(), np.int64, len(words))
        size = int(lengths.sum()) + len(words) + 1
        index = np.dtype(np.int32 if size < 2**31 else np.int64)
        ends = np.cumsum(lengths + 1)
        self._symbols = np.full(size, _END, np.int32)
        inside = np.ones(size, bool)
        inside[0] = inside[ends] = False
        self._symbols[inside] = np.frombuffer(b"".join(words), np.uint8)
        self._weights = np.zeros(size, np.int64)
        self._weights[inside] = np.repeat(occurs, lengths)
        self._next = np.arange(1, size + 1, dtype=index)
        self._previous = np.arange(-1, size - 1, dtype=index)
        self._before: dict[int, _Noted] = {}  # of each merged token: places of what stood before it
        self._after: dict[int, _Noted] = {}  # of each merged token: places where it stood before something else
        self._first = self._note_bytes()

    def _note_bytes(self) -> _Noted:
        """Places of all pairs of bytes."""
        places = np.flatnonzero((self._symbols[:-1] >= 0) & (self._symbols[1:] >= 0)).astype(self._next.dtype)
        keys = (self._symbols[places] * NUM_BYTES + self._symbols[self._next[places]]).astype(np.uint16)
        return _grouped(keys, places)

    def first_pairs(self) -> Pairs:
        """The pairs of bytes."""
        lefts, rights = np.divmod(self._first.symbols.astype(np.int32), NUM_BYTES)
        return Pairs(lefts, rights, self._sums(self._first))

    def places(self, left: int, right: int, noted: np.ndarray | None = None) -> np.ndarray:
        """Where a pair stands, in ascending order: the places of its left symbol.

        Args:
            left: symbol.
            right: symbol.
            noted: an earlier answer for the same pair.
        """
        if noted is None:
            if left < NUM_BYTES and right < NUM_BYTES:
                noted = self._first.of(left * NUM_BYTES + right)
            else:
                noted = self._before[right].of(left) if right >= left else self._after[left].of(right)
        holds = self._symbols[noted] == left
        holds &= self._symbols[self._next[noted]] == right
        return noted[holds]

    def frequency(self, places: np.ndarray) -> int:
        """How often the words with these places occur, each place counted."""
        return int(np.add.reduce(self._weights[places]))

    def first_place(self, symbol: int) -> int:
        """The first place of a symbol; one behind all places if it has none."""
        places = np.flatnonzero(self._symbols == symbol)
        return int(places[0]) if len(places) else len(self._symbols)

    def disjoint(self, places: np.ndarray) -> np.ndarray:
        """Of the places of a pair of equal symbols, those that merge from the left: every second one of each run."""
        if not len(places):
            return places
        number = np.arange(len(places))
        begins = np.zeros(len(places), np.int64)
        begins[1:] = np.where(self._next[places[:-1]] == places[1:], 0, number[1:])
        return places[(number - np.maximum.accumulate(begins)) % 2 == 0]

    def merge(self, token: int, places: np.ndarray) -> list[Pairs]:
        """Merges the pair at each of these places, which do not overlap.

        Args:
            token: the new symbol.
            places: all places of the pair.

        Returns:
            The pairs with the new symbol.
        """
        seconds = self._next[places]
        after = self._next[seconds]
        self._symbols[places] = token
        self._symbols[seconds] = _GONE
        self._next[places] = after
        self._previous[after] = places
        before = self._previous[places]
        lefts, rights = self._symbols[before], self._symbols[after]
        joined = lefts >= 0
        self._before[token] = noted_before = _grouped(lefts[joined], before[joined])
        joined = (rights >= 0) & (rights != token)  # two new ones side by side are noted already
        self._after[token] = noted_after = _grouped(rights[joined], places[joined])
        before_symbols, after_symbols = noted_before.symbols, noted_after.symbols
        tokens = np.full(max(len(before_symbols), len(after_symbols)), token, np.int32)
        return [
            Pairs(before_symbols, tokens[: len(before_symbols)], self._sums(noted_before)),
            Pairs(tokens[: len(after_symbols)], after_symbols, self._sums(noted_after)),
        ]

    def _sums(self, noted: _Noted) -> np.ndarray:
        if not len(noted.places):
            return np.zeros(0, np.int64)
        return np.add.reduceat(self._weights[noted.places], noted.starts[:-1])


def _grouped(symbols: np.ndarray, places: np.ndarray) -> _Noted:
    order = symbols.argsort(kind="stable")
    ordered = symbols[order]
    borders = np.ones(len(ordered) + 1, bool)
    np.not_equal(ordered[1:], ordered[:-1], out=borders[1:-1])
    if not len(ordered):
        return _Noted(ordered, np.zeros(1, np.int64), places)
    (starts,) = borders.nonzero()
    return _Noted(ordered[starts[:-1]], starts, places[order])
