"""Keys and values of positions that a model has read.

Shape suffixes as in `moeport.core.ops`; Q new positions, C room for positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import AttentionOptions, Ops

BLOCK = 128
"""Positions by which a cache grows: shapes change once in this many steps, and no more room than this is unused."""


class LayerCache:
    """Keys (B, C, G, A) and values (B, C, G, W) of one block, in the compute type; empty until positions are read."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []

    def attend(
        self, ops: Ops, q_BQHA: Array, k_BQGA: Array, v_BQGW: Array, position_BQ: Array, scale: float | None = None
    ) -> Array:
        """Attention of new positions to those read before and to themselves, which are added.

        An empty cache is filled from position 0 on.

        Args: as of `Ops.cached_attention`. Returns (B, Q, H, W).
        """
        if not self.arrays:
            self.arrays = [grown(ops, x, room_for(x.shape[1] + 1)) for x in (k_BQGA, v_BQGW)]
            return ops.attention(q_BQHA, k_BQGA, v_BQGW, AttentionOptions(scale=scale))
        keys, values = self.arrays
        out, *self.arrays = ops.cached_attention(q_BQHA, k_BQGA, v_BQGW, keys, values, position_BQ, scale)
        return out


@dataclass
class Cache:
    """The keys and values of several texts that are being continued.

    Args:
        ops: operations on the device.
        rope: cosine and sine of all positions that a text may have, as of `Transformer.rope`.
        layers: by block.
    """

    ops: Ops
    rope: tuple[Array, Array]
    layers: Sequence[LayerCache]

    def make_room(self, positions: int) -> None:
        """Have room for this many positions."""
        for layer in self.layers:
            layer.arrays = [grown(self.ops, x, room_for(positions)) for x in layer.arrays]

    def keep(self, texts: Sequence[int]) -> None:
        """Keep the texts with these indices, in this order."""
        row_B = self.ops.from_numpy(np.array(texts))
        for layer in self.layers:
            layer.arrays = [self.ops.take_rows(x, row_B) for x in layer.arrays]

    def replace(self, text: int, other: Cache) -> None:
        """Put the only text of another cache in place of one."""
        room = max(cache.layers[0].arrays[0].shape[1] for cache in (self, other))
        texts = self.layers[0].arrays[0].shape[0]
        for layer, new in zip(self.layers, other.layers, strict=True):
            pairs = zip(layer.arrays, new.arrays, strict=True)
            layer.arrays = [self.ops.concat([grown(self.ops, x, room) for x in pair], axis=0) for pair in pairs]
        self.keep([texts if row == text else row for row in range(texts)])


@dataclass(frozen=True)
class NewTokens:
    """Tokens that follow those in a cache, on the host."""

    token_BQ: np.ndarray
    """Their ids; shorter texts are filled up at the end."""
    position_BQ: np.ndarray
    """Position of each in its text."""
    first_id_B: np.ndarray
    """Id of the token at position 0 of each text."""
    last_B: np.ndarray
    """Index of the last token of each text among the new ones; scores are wanted after it."""
    cache: Cache


@dataclass(frozen=True)
class Continuation:
    """Where the tokens of a pass are in texts whose earlier positions are in a cache."""

    position_BQ: Array
    """Position of each token in its text."""
    first_id_BQ: Array
    """Id of the first token of its text."""
    layers: Sequence[LayerCache]
    """By block."""
    layer: int = 0
    """The block."""

    def attend(self, ops: Ops, q_BQHA: Array, k_BQGA: Array, v_BQGW: Array, scale: float | None = None) -> Array:
        """`LayerCache.attend` in the block."""
        return self.layers[self.layer].attend(ops, q_BQHA, k_BQGA, v_BQGW, self.position_BQ, scale)


def room_for(positions: int) -> int:
    """The multiple of `BLOCK` that has room for this many positions."""
    return -(-positions // BLOCK) * BLOCK


def grown(ops: Ops, x: Array, room: int) -> Array:
    """Keys or values with room for at least this many positions."""
    batch, have, *rest = x.shape
    if have >= room:
        return x
    return ops.concat([x, ops.zeros((batch, room - have, *rest), ops.dtype(x))], axis=1)
