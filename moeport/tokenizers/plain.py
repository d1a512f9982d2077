"""Encoding without compiled code: a regular expression cuts, and a cache holds the ids of words seen before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, takewhile

import numpy as np

from moeport.tokenizers.definition import Definition
from moeport.tokenizers.splitting import splitter
from moeport.tokenizers.streaming import as_text
from moeport.tokenizers.words import word_encoder

CACHED_WORDS = 2**18
"""Words whose ids are kept; then the cache starts anew."""

CACHED_LENGTH = 256
"""Longer words are not kept: they hardly recur."""


class PlainEngine:
    """Ids of texts, one after the other."""

    def __init__(self, definition: Definition):
        self._split = splitter(definition.pattern)
        self._cache = _Cache(word_encoder(definition))

    def threads(self, workers: int | None, size: int) -> int:
        """One: Python runs one at a time."""
        return 1

    def encode(self, texts: Sequence[bytes], workers: int | None) -> list[np.ndarray]:
        """The ids of each text, uint32."""
        return [self._ids(self._split(as_text(text))) for text in texts]

    def encode_until(self, text: bytes, limit: int) -> tuple[np.ndarray, int]:
        """The ids of the pre-tokens that end at or before this byte, and the end of the last one."""
        words = self._split(as_text(text))
        ends = list(takewhile(limit.__ge__, accumulate(len(_bytes(word)) for word in words)))
        return self._ids(words[: len(ends)]), ends[-1] if ends else 0

    def _ids(self, words: list[str]) -> np.ndarray:
        return np.array(list(chain.from_iterable(map(self._cache.__getitem__, words))), np.uint32)


class _Cache(dict[str, list[int]]):
    def __init__(self, encode: Callable[[bytes], list[int]]):
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(_bytes(word))
        if len(word) <= CACHED_LENGTH:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _bytes(word: str) -> bytes:
    return word.encode("utf-8", "surrogateescape")
