"""LBPE: the longest token of the vocabulary anywhere in a pre-token is fixed, then what is left and right of it.

Li et al., LBPE (2411.05504), as we read it: of several longest ones the leftmost. Merges play no part.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection
from itertools import pairwise

from moeport.errors import DataError
from moeport.tokenizers.vocabulary import Vocabulary


def longest_first(word: bytes, vocabulary: Vocabulary | Collection[bytes]) -> list[bytes]:
    """The tokens of a pre-token, the longest first, the leftmost of equally long ones.

    For many words build one `longest_first_of` instead.

    Args:
        word: the pre-token.
        vocabulary: the tokens, or a trained vocabulary, of which its normal tokens count (never scaffolds).

    Raises:
        DataError: a byte of the word is in no token that fits.
    """
    tokens = vocabulary.tokens if isinstance(vocabulary, Vocabulary) else vocabulary
    return longest_first_of(tokens)(word)


def longest_first_of(tokens: Collection[bytes]) -> Callable[[bytes], list[bytes]]:
    """The function that encodes words by `longest_first` over these tokens."""
    known = frozenset(tokens)
    lengths = sorted({len(token) for token in known if token}, reverse=True)

    def longest_at(word: bytes, start: int, limit: int) -> int:
        for length in lengths:
            if length <= limit and word[start : start + length] in known:
                return length
        raise DataError(
            f"no token for the byte {word[start : start + 1]!r}: a vocabulary needs a token for each byte that occurs"
        )

    def encode(word: bytes) -> list[bytes]:
        return _fixed(word, longest_at)

    return encode


def _fixed(word: bytes, longest_at: Callable[[bytes, int, int], int]) -> list[bytes]:
    """Fixes tokens from the longest to the shortest.

    The queue holds, for each place not yet covered, the longest token that starts there and still fits. Whatever covers
    its end meanwhile is at least as long, so it also covers the last byte: one look finds it.
    """
    size = len(word)
    owner = [-1] * size
    queue = [(-longest_at(word, start, size - start), start) for start in range(size)]
    heapq.heapify(queue)
    while queue:
        negative, start = heapq.heappop(queue)
        end = start - negative
        if owner[start] >= 0:
            continue
        if owner[end - 1] >= 0:
            heapq.heappush(queue, (-longest_at(word, start, owner[end - 1] - start), start))
        else:
            owner[start:end] = [start] * (end - start)
    starts = [place for place in range(size) if owner[place] == place]
    return [word[start:end] for start, end in pairwise([*starts, size])]
