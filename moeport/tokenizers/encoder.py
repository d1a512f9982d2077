"""Text to ids and back, for every tokenizer that a definition describes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moeport.errors import DataError
from moeport.tokenizers.definition import Definition
from moeport.tokenizers.engines import Engine, engine_of
from moeport.tokenizers.normalizing import normalizing
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.streaming import (
    BLOCK,
    REACH,
    REACH_OF_OTHERS,
    as_bytes,
    as_text,
    blocks,
    last_certain,
    segments,
)

LONG = 4 * BLOCK
"""Bytes of a text from which on it is encoded in parts."""


class Encoder:
    """Encodes and decodes; equal definitions give equal ids on every machine, whatever is installed.

    Args:
        definition: the tokenizer.
        engine: "auto", "plain" or "compiled"; see `engine_of`.

    Raises:
        DataError: the pattern is no regular expression, or there is no such engine.
    """

    def __init__(self, definition: Definition, engine: str = "auto"):
        self.definition, self._choice = definition, engine
        self.vocab_size = definition.size
        """Number of ids, including unused ones below the largest."""
        self._engine: Engine = engine_of(definition, engine)
        self._normalized = normalizing(definition.normalizer)
        self._table = _Bytes(definition)
        named = sorted(definition.special_tokens, key=lambda token: (-len(token), token))
        self._special = re.compile(b"|".join(re.escape(token.encode()) for token in named)) if named else None
        self._is_named = definition.pattern in PATTERNS
        self._reach = REACH if self._is_named else REACH_OF_OTHERS

    def __reduce__(self) -> tuple[Any, ...]:
        """Tables and caches are built anew."""
        return Encoder, (self.definition, self._choice)

    def encode_batch(
        self, texts: Sequence[str | bytes], special: bool = False, workers: int | None = None
    ) -> list[np.ndarray]:
        """The ids of each text, uint32.

        Args:
            texts: texts, or bytes of any kind.
            special: special tokens spelled out in a text become their ids. Otherwise they are ordinary text.
            workers: threads; None: one per processor. The plain engine uses one.
        """
        data = [as_bytes(text) for text in texts]
        if special and self._special is not None:
            return [self._with_special(text) for text in data]
        data = [self._normalized(text) for text in data]
        if not self._is_named or max(map(len, data), default=0) <= LONG:
            return self._engine.encode(data, workers)
        others = iter(self._engine.encode([text for text in data if len(text) <= LONG], workers))
        return [self._long(text, workers) if len(text) > LONG else next(others) for text in data]

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The ids of bytes that need not be UTF-8, uint32. A byte that is not is a symbol of its own."""
        return self.encode_batch([data], workers=1)[0]

    def encode_with_offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, and where in it each stands.

        Args:
            text: the text.
            special: as for `encode_batch`.

        Returns:
            ids uint32 (n), and for each the place of its first character and of the one after its last, int64 (n, 2). A
            token that holds a part of a character spans the whole of it.

        Raises:
            DataError: the normalizer of the tokenizer changes the text.
        """
        whole = as_bytes(text)
        if self._normalized(whole) != whole:
            raise DataError(
                f"the tokenizer changes the text ({self.definition.normalizer}), so its tokens have no places in it; "
                "normalize it beforehand"
            )
        (ids,) = self.encode_batch([text], special)
        data = np.frombuffer(whole, np.uint8)
        begun = np.concatenate(([0], np.cumsum((data & 0xC0) != 0x80)))  # characters that began before each byte
        ends = np.cumsum(self._table.lengths[ids])
        starts = ends - self._table.lengths[ids]
        first = begun[np.minimum(starts + 1, len(data))] - 1 if len(ids) else ends
        return ids, np.stack([first, begun[ends]], 1)

    def encode_stream(self, chunks: Iterable[str | bytes]) -> Iterator[np.ndarray]:
        """The ids of a text that comes in chunks of any size, uint32; how it is cut does not matter.

        It holds a few MB, or the longest pre-token where that is longer. A pattern that is not one of `PATTERNS` may
        look at most 64 KiB beyond a pre-token and the white space behind it. A tokenizer with a normalizer holds the
        whole text.
        """
        if self.definition.normalizer:
            chunks = [self._normalized(b"".join(map(as_bytes, chunks)))]
        rest, enough = b"", BLOCK
        for block in blocks(chunks):
            rest += block
            if len(rest) < enough:
                continue
            ids, end = self._engine.encode_until(rest, last_certain(rest, self._reach))
            rest, enough = rest[end:], BLOCK if end else 2 * len(rest)
            if len(ids):
                yield ids
        if rest:
            yield self.encode_bytes(rest)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of the ids, special tokens spelled out. Ids that no token has add nothing.

        Raises:
            DataError: an id is negative.
        """
        return self._table.join(np.asarray(ids, np.int64).reshape(-1))

    def _long(self, text: bytes, workers: int | None) -> np.ndarray:
        """The ids of one long text, whose parts are encoded at the same time."""
        with ThreadPoolExecutor(self._engine.threads(workers, len(text))) as pool:
            parts = pool.map(lambda segment: self._engine.encode_until(*segment)[0], segments(text))
            return np.concatenate(list(parts))

    def _with_special(self, text: bytes) -> np.ndarray:
        """The ids of a text in which special tokens count."""
        assert self._special is not None
        parts: list[np.ndarray] = []
        place = 0
        for found in self._special.finditer(text):
            parts.append(self.encode_bytes(text[place : found.start()]))
            parts.append(np.array([self.definition.special_tokens[as_text(found[0])]], np.uint32))
            place = found.end()
        return np.concatenate([*parts, self.encode_bytes(text[place:])])


class _Bytes:
    """The bytes of every id in one array, so that many are joined at once."""

    def __init__(self, definition: Definition):
        tokens = [b""] * definition.size
        for token, number in definition.ids.items():
            tokens[number] = token
        for text, number in definition.special_tokens.items():
            tokens[number] = text.encode()
        self.lengths = np.array([len(token) for token in tokens], np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._bytes = np.frombuffer(b"".join(tokens), np.uint8)

    def join(self, ids: np.ndarray) -> bytes:
        if len(ids) and ids.min() < 0:
            raise DataError(f"the id {ids.min()} is negative; expected ids from 0 to {len(self.lengths) - 1}")
        ids = ids[ids < len(self.lengths)]
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self._starts[ids] - (ends - lengths), lengths)
        return self._bytes[places].tobytes()
