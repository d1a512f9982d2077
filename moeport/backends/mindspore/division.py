"""How the ranks that hold copies of parameters divide them: which range of its entries each rank updates and writes.

Parameters that are held by the same ranks lie one behind the other in a sequence, which is cut into buckets of bounded
size; of each bucket every rank has an equal share. A share of AdamW's parameters may begin at any entry, one of Muon's
only where a matrix does, so these have a sequence for each size of matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from moeport.core.moments import rule_of
from moeport.core.muon import batch_shape
from moeport.core.parameters import ParameterSpec

BUCKET = 2**23
"""Most entries of a bucket, unless one matrix per rank is more: 32 MiB in float32."""


@dataclass(frozen=True)
class Piece:
    """A range of the local entries of a parameter, counted as in its flattened array."""

    name: str
    first: int
    count: int

    @property
    def key(self) -> str:
        """Names the piece; the pieces of one rank do not overlap."""
        return f"{self.name}[{self.first}]"

    @property
    def slice(self) -> slice:
        """What to index the flattened parameter with."""
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True)
class Bucket:
    """Pieces that lie one behind the other, of which each of some ranks has an equal share."""

    is_expert: bool
    """Whether the ranks are those that hold the same experts, rather than all."""
    trainable: bool
    ranks: int
    share: int
    """Entries per rank; the last shares may be filled up with zeros."""
    pieces: tuple[Piece, ...]

    @cached_property
    def padding(self) -> int:
        """Zeros at the end."""
        return self.ranks * self.share - sum(piece.count for piece in self.pieces)

    def own(self, rank: int) -> tuple[Piece, ...]:
        """The share of the rank at a position."""
        return _cut(self.pieces, rank * self.share, self.share)


def divide(
    specs: Iterable[ParameterSpec],
    shapes: Mapping[str, Sequence[int]],
    ranks_of: Callable[[bool], int],
    optimizer: str,
    limit: int | None = None,
) -> list[Bucket]:
    """The buckets of some parameters, the same on every rank.

    Args:
        specs: the parameters.
        shapes: of what a rank holds of each.
        ranks_of: number of ranks that hold copies, of experts or of everything else.
        optimizer: `optimizer.name`.
        limit: most entries of a bucket; default BUCKET.
    """
    sequences: dict[tuple[bool, bool, int], list[Piece]] = {}
    for spec in specs:
        shape = shapes[spec.name]
        unit = prod(batch_shape(spec, shape)[1:]) if rule_of(spec, optimizer) == "muon" else 1
        key = spec.is_expert, spec.trainable, unit
        sequences.setdefault(key, []).append(Piece(spec.name, 0, prod(shape)))
    found = []
    for (is_expert, trainable, unit), pieces in sequences.items():
        ranks = ranks_of(is_expert)
        cut = [(piece,) for piece in pieces] if ranks == 1 else _buckets(pieces, ranks * unit, limit or BUCKET)
        for part in cut:
            units = -(-sum(piece.count for piece in part) // unit)
            found.append(Bucket(is_expert, trainable, ranks, -(-units // ranks) * unit, part))
    return found


def _buckets(pieces: Sequence[Piece], step: int, limit: int) -> Iterator[tuple[Piece, ...]]:
    """Cuts of a sequence, each of a multiple of `step` entries but the last."""
    size, total = max(1, limit // step) * step, sum(piece.count for piece in pieces)
    return (_cut(pieces, first, size) for first in range(0, total, size))


def _cut(pieces: Sequence[Piece], first: int, count: int) -> tuple[Piece, ...]:
    """What a range of the sequence of pieces holds of them."""
    found, begin = [], 0
    for piece in pieces:
        start, end = max(first, begin), min(first + count, begin + piece.count)
        if start < end:
            found.append(Piece(piece.name, piece.first + start - begin, end - start))
        begin += piece.count
    return tuple(found)
