"""Encodings written from their definitions, slow and plain."""

from __future__ import annotations

import random
from collections.abc import Collection

from moeport.tokenizers.vocabulary import BYTES, Vocabulary


def longest_anywhere(word: bytes, tokens: Collection[bytes]) -> list[bytes]:
    """LBPE: the longest token in the word, the leftmost of equally long ones; then what is left and right of it."""
    for length in range(len(word), 0, -1):
        for start in range(len(word) - length + 1):
            if (found := word[start : start + length]) in tokens:
                left, right = word[:start], word[start + length :]
                return [*longest_anywhere(left, tokens), found, *longest_anywhere(right, tokens)]
    return []


def longest_merge(word: bytes, vocabulary: Vocabulary) -> list[bytes]:
    """LBPE read as merging: of adjacent parts that merge, those of the longest token, the leftmost of equally long."""
    parts = [word[place : place + 1] for place in range(len(word))]
    pairs = set(vocabulary.merges)
    while places := [place for place in range(len(parts) - 1) if (parts[place], parts[place + 1]) in pairs]:
        place = max(places, key=lambda place: (len(parts[place] + parts[place + 1]), -place))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return demolished(parts, vocabulary)


def lowest_rank(word: bytes, vocabulary: Vocabulary) -> list[bytes]:
    """Algorithm 2 of Scaffold-BPE, one place at a time, by the rank of the token."""
    parts = [word[place : place + 1] for place in range(len(word))]
    ranks = {left + right: rank for rank, (left, right) in enumerate(vocabulary.merges)}
    while places := [place for place in range(len(parts) - 1) if parts[place] + parts[place + 1] in ranks]:
        place = min(places, key=lambda place: (ranks[parts[place] + parts[place + 1]], place))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return demolished(parts, vocabulary)


def demolished(parts: Collection[bytes], vocabulary: Vocabulary) -> list[bytes]:
    """Every scaffold taken apart the way it was merged."""
    made = {left + right: (left, right) for left, right in vocabulary.merges}
    return [
        piece
        for part in parts
        for piece in (demolished(made[part], vocabulary) if part in vocabulary.scaffolds else [part])
    ]


def trained(words: Collection[bytes], merges: int, scaffolds: float = 0.0, seed: int = 0) -> Vocabulary:
    """BPE of the words, the smallest of the most frequent pairs first; tokens at random are scaffolds."""
    texts = [[word[place : place + 1] for place in range(len(word))] for word in words]
    pairs: list[tuple[bytes, bytes]] = []
    for _ in range(merges):
        counts: dict[tuple[bytes, bytes], int] = {}
        for parts in texts:
            for place in range(len(parts) - 1):
                counts[parts[place], parts[place + 1]] = counts.get((parts[place], parts[place + 1]), 0) + 1
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        pairs.append(pair)
        for parts in texts:
            for place in range(len(parts) - 2, -1, -1):
                if (parts[place], parts[place + 1]) == pair and not _overlaps(parts, place, pair):
                    parts[place : place + 2] = [pair[0] + pair[1]]
    choice = random.Random(seed)
    hidden = frozenset(left + right for left, right in pairs if choice.random() < scaffolds)
    return Vocabulary("scaffold_bpe" if hidden else "bpe", tuple(pairs), hidden, BYTES)


def _overlaps(parts: list[bytes], place: int, pair: tuple[bytes, bytes]) -> bool:
    """Whether the pair here shares a part with the one to its left, which goes first."""
    run = 0
    while pair[0] == pair[1] and place - run > 0 and parts[place - run - 1] == pair[0]:
        run += 1
    return run % 2 == 1
