"""Several streams of tokens as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain

import numpy as np

from moeport.data.packed import PackedTokens
from moeport.data.sampler import MixedSampler


class MixedTokens:
    """The streams of several sources. Each is cut into sequences by itself; their indices follow each other.

    Args:
        parts: by name, the stream of each source, or a mixture itself, all with the same sequence length.
        weights: by name, the share of each source in what is trained on, in any unit.
    """

    def __init__(self, parts: Mapping[str, PackedTokens | MixedTokens], weights: Mapping[str, float]):
        self.parts, self.weights = parts, weights
        self._streams = [*parts.values()]
        self.sequence_length: int = self._streams[0].sequence_length
        self._starts = np.cumsum([0, *(part.num_sequences for part in self._streams)])

    @property
    def num_tokens(self) -> int:
        """Tokens of all streams."""
        return sum(part.num_tokens for part in self._streams)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(part.num_bytes for part in self._streams)

    @property
    def num_documents(self) -> int:
        """Documents of all streams."""
        return sum(part.num_documents for part in self._streams)

    @property
    def num_sequences(self) -> int:
        """Full sequences of all streams."""
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the names, weights and fingerprints of the streams."""
        listed = [[name, self.weights[name], part.fingerprint] for name, part in self.parts.items()]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def sampler(self, batch_size: int, seed: int) -> MixedSampler:
        """Which sequences a step trains on."""
        sizes = {name: part.num_sequences for name, part in self.parts.items()}
        return MixedSampler(sizes, self.weights, batch_size, seed)

    def shares_label(self) -> str:
        """The share of each source, such as `web 75.0%, code 25.0%`."""
        total = sum(self.weights.values())
        return ", ".join(f"{name} {weight / total:.1%}" for name, weight in self.weights.items())

    def token_counts(self) -> np.ndarray:
        """How often each vocabulary id is trained on, (V,) int64: the counts of each stream in its share."""
        total, weight = self.num_tokens, sum(self.weights.values())
        counts_V = sum(
            part.token_counts() * (total * self.weights[name] / weight / part.num_tokens)
            for name, part in self.parts.items()
        )
        return np.rint(counts_V).astype(np.int64)

    def first(self, count: int) -> np.ndarray:
        """The first tokens of the first document, at most `count`, int64."""
        return self._streams[0].first(count)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (S,) and targets (S,) of one full sequence, int64."""
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._streams[number].sequence(int(index - self._starts[number]))

    def batch(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (B, S) and targets (B, S) of full sequences, int64."""
        rows = [self.sequence(int(index)) for index in indices_B]
        return np.stack([inputs for inputs, _ in rows]), np.stack([targets for _, targets in rows])

    def windows(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The windows of each stream, one stream after the other; see `PackedTokens.windows`."""
        return chain.from_iterable(part.windows(batch_size) for part in self._streams)
