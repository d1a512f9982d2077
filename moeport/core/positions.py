"""Where in a sequence assignments are dropped. Shape suffixes as in `moeport.core.ops`; P ranges of positions."""

from __future__ import annotations

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing

MOST_RANGES = 16
"""The most ranges of positions that a sequence is divided into."""


def position_ranges(sequence_length: int) -> int:
    """P: the number of ranges, of equal length up to rounding; position s is in range s * P // S."""
    return min(MOST_RANGES, sequence_length)


def drops_by_position(ops: Ops, chosen: Routing, served: Routing, num_sequences: int) -> Array:
    """Assignments chosen and assignments dropped in each range of positions, (2, P) of the index type.

    Args:
        ops: the backend's operations.
        chosen: what the router chose, in token-major order.
        served: the same after drops.
        num_sequences: sequences of equal length that make up the tokens.
    """
    length = chosen.num_tokens // num_sequences
    ranges = position_ranges(length)
    token_N = ops.arange(chosen.expert_N.shape[0]) // ops.index(chosen.expert_N.shape[0] // chosen.num_tokens)
    position_N = token_N - token_N // ops.index(length) * ops.index(length)
    range_N = position_N * ops.index(ranges) // ops.index(length)
    unrouted, outside = ops.index(chosen.num_experts), ops.index(ranges)
    chosen_N = ops.where(chosen.expert_N < unrouted, range_N, outside)
    dropped_N = ops.where(served.expert_N < unrouted, outside, chosen_N)
    counts = [ops.reshape(ops.bincount(ids_N, ranges + 1)[:ranges], (1, -1)) for ids_N in (chosen_N, dropped_N)]
    return ops.concat(counts, axis=0)
