"""The queue of training: the most frequent pair, and the most frequent scaffold that waits for readmission.

Both are heaps whose entries may be out of date: an entry is checked when it comes to the head. That suffices, since no
pair and no token becomes more frequent.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moeport.tokenizers.byte_level import byte_characters
from moeport.tokenizers.linked_words import LinkedWords, Pairs
from moeport.tokenizers.training_choices import Choices


class PairEntry(NamedTuple):
    """A pair in the queue; the smallest entry is the head."""

    negative: int
    """Minus its frequency."""
    tie: tuple[Any, ...]
    """The smaller, the earlier among equally frequent entries."""
    left: int
    right: int


class ScaffoldEntry(NamedTuple):
    """A waiting scaffold in the queue; the smallest entry is the head."""

    negative: int
    tie: tuple[Any, ...]
    token: int


class Ties:
    """The order of equally frequent entries.

    Args:
        rule: one of `PAIR_TIES`.
        tokens: the byte strings by symbol; grows meanwhile.
    """

    def __init__(self, rule: str, tokens: Sequence[bytes]):
        self._tokens = tokens
        characters = byte_characters()
        ordered = sorted(characters)
        self._order = [ordered.index(character) for character in characters]
        self.of: Callable[[int, int, int], tuple[Any, ...]] = getattr(self, f"_{rule}")
        """Left symbol, right symbol and the first place: what sorts them. Without a place it gives a lower bound."""
        self.by_place = rule == "first"
        """Whether the place counts."""

    def _smallest(self, left: int, right: int, _: int) -> tuple[Any, ...]:
        return self._tokens[left], self._tokens[right]

    def _largest(self, left: int, right: int, _: int) -> tuple[Any, ...]:
        return tuple((*(-byte for byte in self._tokens[symbol]), 1) for symbol in (left, right))

    def _oldest(self, left: int, right: int, _: int) -> tuple[Any, ...]:
        return left, right

    def _newest(self, left: int, right: int, _: int) -> tuple[Any, ...]:
        return -left, -right

    def _merged(self, left: int, right: int, _: int) -> tuple[Any, ...]:
        return self._tokens[left] + self._tokens[right], self._tokens[left]

    def _first(self, left: int, right: int, place: int) -> tuple[Any, ...]:
        return place, self._tokens[left], self._tokens[right]

    def _huggingface(self, left: int, right: int, _: int) -> tuple[Any, ...]:
        order = self._order
        return order[left] if left < 256 else left, order[right] if right < 256 else right


class PairQueue:
    """Pairs by frequency.

    Rare pairs, which are most of them, stay in arrays until the head is about as rare.

    Args:
        words: where the pairs are.
        ties: the order of equally frequent pairs.
        choices: `overlaps` and `min_frequency` count.
    """

    def __init__(self, words: LinkedWords, ties: Ties, choices: Choices):
        self._words, self._ties = words, ties
        self._disjoint, self._least = choices.overlaps == "disjoint", choices.min_frequency
        self._heap: list[PairEntry] = []
        self._rare: list[Pairs] = []  # at most as frequent as noted here
        self._fallen: list[tuple[int, int, int]] = []  # the same, of pairs that were in the heap
        self._limit = 2**62  # pairs in the heap are at least as frequent
        self._places: dict[tuple[int, int], np.ndarray] = {}
        self._checked = False
        self.add(words.first_pairs())

    def add(self, pairs: Pairs) -> None:
        """Takes new pairs; the words have changed."""
        self._checked = False
        often = pairs.frequencies >= self._limit
        if often.any():
            for entry in zip(*(column[often].tolist() for column in pairs), strict=True):
                self._push(*entry)
        if not often.all():
            self._rare.append(Pairs(*(column[~often] for column in pairs)) if often.any() else pairs)

    def head(self) -> PairEntry | None:
        """The most frequent pair as it is now; None: there is none."""
        while not self._checked:
            if self._heap:
                self._check(self._heap[0])
            elif not self._refill():
                return None
        return self._heap[0]

    def pop(self) -> np.ndarray:
        """Takes off the head, which `head` gave. Its places, in ascending order."""
        entry = heapq.heappop(self._heap)
        self._checked = False
        return self._places.pop((entry.left, entry.right))

    def _push(self, left: int, right: int, frequency: int) -> None:
        heapq.heappush(self._heap, PairEntry(-frequency, self._ties.of(left, right, -1), left, right))

    def _check(self, entry: PairEntry) -> None:
        """Whether the first entry of the heap is up to date; brings it up to date."""
        _, _, left, right = entry
        places = self._words.places(left, right, self._places.get((left, right)))
        counted = self._words.disjoint(places) if self._disjoint and left == right else places
        frequency = self._words.frequency(counted)
        if frequency < self._limit:
            heapq.heappop(self._heap)
            self._places.pop((left, right), None)
            self._fallen.append((left, right, frequency))
            return
        self._places[left, right] = places
        current = PairEntry(-frequency, self._ties.of(left, right, int(places[0])), left, right)
        if current == entry:
            self._checked = True
        else:
            heapq.heapreplace(self._heap, current)

    def _refill(self) -> bool:
        """Moves the most frequent of the rare pairs into the empty heap; False: there are none."""
        fallen = np.array(self._fallen, np.int64).reshape(-1, 3).T
        lefts, rights, frequencies = (np.concatenate(parts) for parts in zip(*self._rare, Pairs(*fallen), strict=True))
        self._fallen, self._rare = [], []
        highest = int(frequencies.max(initial=0))
        if highest < self._least:
            return False
        self._limit = max(self._least, highest // 2)
        for chosen, kept in ((frequencies >= self._limit, False), (frequencies < self._limit, True)):
            pairs = Pairs(lefts[chosen].astype(np.int32), rights[chosen].astype(np.int32), frequencies[chosen])
            if kept:
                self._rare.append(pairs)
            else:
                for entry in zip(*(column.tolist() for column in pairs), strict=True):
                    self._push(*entry)
        return True


class ScaffoldQueue:
    """Waiting scaffolds by frequency.

    Args:
        words: where they are.
        ties: the order of equally frequent scaffolds, by the pairs that they were merged from.
        frequencies: of each symbol as it is now.
        current: whether the key of a scaffold is its frequency as it is, rather than as it was when pushed.
    """

    def __init__(self, words: LinkedWords, ties: Ties, frequencies: Sequence[int], current: bool):
        self._words, self._ties, self._frequencies, self._current = words, ties, frequencies, current
        self._heap: list[ScaffoldEntry] = []
        self._pairs: dict[int, tuple[int, int]] = {}

    def __iter__(self) -> Iterator[int]:
        return (entry.token for entry in self._heap)

    def push(self, token: int, pair: tuple[int, int]) -> None:
        """Adds a scaffold, with the pair that it was merged from."""
        self._pairs[token] = pair
        heapq.heappush(self._heap, self._entry(token, self._frequencies[token]))

    def pop(self) -> int:
        """Takes off the head."""
        return heapq.heappop(self._heap).token

    def head(self) -> ScaffoldEntry | None:
        """The most frequent scaffold; None: there is none."""
        while self._heap:
            entry = self._heap[0]
            frequency = self._frequencies[entry.token] if self._current else -entry.negative
            current = self._entry(entry.token, frequency)
            if current == entry:
                return entry
            heapq.heapreplace(self._heap, current)
        return None

    def _entry(self, token: int, frequency: int) -> ScaffoldEntry:
        place = self._words.first_place(token) if self._ties.by_place else -1
        return ScaffoldEntry(-frequency, self._ties.of(*self._pairs[token], place), token)
