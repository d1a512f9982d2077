"""The order of rows that are rotated: neighbours in DeepSeek's tensors, halves in ours.

A rotary embedding turns pairs of numbers. DeepSeek pairs 2i with 2i + 1, and moeport i with i + A/2. Queries and keys
are put in our order alike, by the rows of their projections, so scores stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moeport.training.tensor_file import StoredTensor


@dataclass(frozen=True)
class Pairs:
    """Which rows of a matrix are rotated."""

    period: int
    """Rows of a head, or of the whole matrix if it has one part for all heads."""
    plain: int
    """The number of unrotated rows at the beginning of each period."""
    columns: int

    def heads(self, size: int) -> Iterator[tuple[int, int]]:
        """First element and number of elements of each of the heads that `size` elements hold."""
        step = self.period * self.columns
        return ((place, step) for place in range(0, size, step))

    def to_ours(self, values: np.ndarray) -> np.ndarray:
        """Elements of whole heads, as they lie in our parameter, from those in their tensor."""
        heads = values.reshape(-1, self.period, self.columns)
        first, second = heads[:, self.plain :: 2], heads[:, self.plain + 1 :: 2]
        return np.concatenate([heads[:, : self.plain], first, second], axis=1).reshape(-1)

    def to_theirs(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        heads = values.reshape(-1, self.period, self.columns)
        found, half = heads.copy(), (self.period - self.plain) // 2
        found[:, self.plain :: 2] = heads[:, self.plain : self.plain + half]
        found[:, self.plain + 1 :: 2] = heads[:, self.plain + half :]
        return found.reshape(-1)


def blocks_of(tensor: StoredTensor, start: int, size: int, pairs: Pairs | None) -> Iterator[bytes]:
    """The bytes of `size` elements from `start` on: in blocks, which are whole heads if some rows are in pairs."""
    if pairs is None:
        yield from tensor.blocks(start, size)
        return
    for place, step in pairs.heads(size):
        yield b"".join(tensor.blocks(start + place, step))
