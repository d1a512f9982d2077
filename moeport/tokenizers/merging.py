"""Byte-pair merges applied to one word, in time n log n: by rank, or the pair that makes the longest token first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from moeport.tokenizers.vocabulary import Vocabulary


def merging(vocabulary: Vocabulary, longest: bool = False) -> Callable[[bytes], list[bytes]]:
    """The function that encodes words by merging pairs, without demolishing scaffolds.

    Args:
        vocabulary: its merges over the expanded vocabulary are applied, lowest rank first, then leftmost.
        longest: of the pairs that may merge, the one that makes the longest token first, then the leftmost (LBPE, the
            other reading).
    """
    longest_length = max((len(left + right) for left, right in vocabulary.merges), default=0)
    first: dict[tuple[bytes, bytes], int] = {}
    for rank, (left, right) in enumerate(vocabulary.merges):
        first.setdefault((left, right), longest_length - len(left + right) if longest else rank)

    def encode(word: bytes) -> list[bytes]:
        return _merged(word, first)

    return encode


def _merged(word: bytes, priority: Mapping[tuple[bytes, bytes], int]) -> list[bytes]:
    """The parts of a word when no pair is left that merges. Entries of the queue that no longer hold are skipped."""
    size = len(word)
    part: list[bytes] = [word[place : place + 1] for place in range(size)]
    following, before = list(range(1, size + 1)), list(range(-1, size - 1))
    queue = [
        (priority[pair], place) for place in range(size - 1) if (pair := (part[place], part[place + 1])) in priority
    ]
    heapq.heapify(queue)
    while queue:
        rank, left = heapq.heappop(queue)
        right = following[left]
        if right == size or not part[left] or priority.get((part[left], part[right])) != rank:
            continue
        part[left] += part[right]
        part[right] = b""
        following[left] = after = following[right]
        if after < size:
            before[after] = left
            if (pair := (part[left], part[after])) in priority:
                heapq.heappush(queue, (priority[pair], left))
        previous = before[left]
        if previous >= 0 and (pair := (part[previous], part[left])) in priority:
            heapq.heappush(queue, (priority[pair], previous))
    return [token for token in part if token]
