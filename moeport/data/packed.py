"""Documents packed into memory-mapped files of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moeport.data.token_files import check_files, read_metadata, shard_path

TOKENS_PER_BLOCK = 1 << 24


class PackedTokens:
    """A stream of tokens, in one file or several shards, cut into sequences of S tokens.

    The targets are the tokens that follow.

    Args:
        path: the token file.
        sequence_length: S.

    Raises:
        DataError: the file or its metadata is missing, damaged or in another format.
    """

    def __init__(self, path: Path, sequence_length: int):
        self.metadata = read_metadata(path)
        self.sequence_length = sequence_length
        check_files(path, self.metadata)
        files = self.metadata.files
        self._shards = [np.memmap(shard_path(path, number), self.metadata.dtype, "r") for number in range(len(files))]
        self._starts = np.cumsum([0, *(file.num_tokens for file in files)])
        """Place in the stream at which each shard starts, and the end of the stream."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream. All except the first are predicted."""
        return self.metadata.num_tokens

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return self.metadata.num_bytes

    @property
    def num_documents(self) -> int:
        """Documents in the stream."""
        return self.metadata.num_documents

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the tokens, however they are divided into files."""
        return self.metadata.sha256

    def token_counts(self) -> np.ndarray:
        """Number of occurrences of each vocabulary id in the stream, (V,) int64."""
        counts_V = np.zeros(self.metadata.vocab_size, np.int64)
        for shard in self._shards:
            for start in range(0, len(shard), TOKENS_PER_BLOCK):
                counts_V += np.bincount(shard[start : start + TOKENS_PER_BLOCK], minlength=len(counts_V))
        return counts_V

    def first(self, count: int) -> np.ndarray:
        """The first tokens of the first document, at most `count`, int64."""
        return self._window(1, count - 1)

    @property
    def num_sequences(self) -> int:
        """Number of full sequences. Each takes S + 1 tokens and shares one with the next sequence."""
        return (self.num_tokens - 1) // self.sequence_length

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (S,) and targets (S,) of one full sequence, int64."""
        tokens = self._window(index * self.sequence_length, self.sequence_length)
        return tokens[:-1], tokens[1:]

    def batch(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (B, S) and targets (B, S) of full sequences, int64."""
        tokens = np.stack([self._window(index * self.sequence_length, self.sequence_length) for index in indices_B])
        return tokens[:, :-1], tokens[:, 1:]

    def windows(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of inputs (B, S) and targets (B, S), int64, in which every token except the first is a target once.

        B is `batch_size`, or less for the last full sequences. Remaining tokens come last, as (1, S') with S' < S.
        """
        for first in range(0, self.num_sequences, batch_size):
            yield self.batch(np.arange(first, min(first + batch_size, self.num_sequences)))
        covered = self.num_sequences * self.sequence_length
        rest = self.num_tokens - 1 - covered
        if rest:
            tokens = self._window(covered, rest)[None]
            yield tokens[:, :-1], tokens[:, 1:]

    def _window(self, start: int, length: int) -> np.ndarray:
        end = min(start + length + 1, self.num_tokens)
        number = int(np.searchsorted(self._starts, start, "right")) - 1
        parts = [np.empty(0, np.int64)]
        while start < end:
            offset, stop = self._starts[number], min(end, self._starts[number + 1])
            parts.append(self._shards[number][start - offset : stop - offset])
            start, number = stop, number + 1
        return np.concatenate(parts)
