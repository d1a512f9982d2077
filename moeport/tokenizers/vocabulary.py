"""What training gives: the merges of byte pairs in order, and which of the merged tokens are scaffolds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from moeport.errors import DataError, choices

ALGORITHMS = ("bpe", "scaffold_bpe")
"""How a vocabulary is trained."""

BYTES = tuple(bytes([byte]) for byte in range(256))
"""The single bytes, which every vocabulary begins with."""


@dataclass(frozen=True)
class Vocabulary:
    """Byte strings and the merges that make them.

    The *expanded* vocabulary has all of them. A *scaffold* is one that only helps to build longer tokens: text never
    becomes a scaffold, but the normal tokens that it was merged from.

    Args:
        algorithm: one of `ALGORITHMS`.
        merges: the pairs in order of training. The place of a pair is the rank of its token.
        scaffolds: the tokens that are no normal ones. Single bytes never are.
        base: the single bytes in byte order.

    Raises:
        DataError: the parts do not fit together.
    """

    algorithm: str
    merges: tuple[tuple[bytes, bytes], ...] = ()
    scaffolds: frozenset[bytes] = frozenset()
    base: tuple[bytes, ...] = BYTES

    def __post_init__(self) -> None:
        """Refuses a vocabulary that cannot have come out of training."""
        if self.algorithm not in ALGORITHMS:
            raise DataError(f"algorithm: got {self.algorithm!r}; {choices(self.algorithm, ALGORITHMS)}")
        if self.base != BYTES:
            raise DataError(f"base: expected the 256 single bytes in byte order, got {len(self.base)} entries")
        known = {*self.base}
        for rank, (left, right) in enumerate(self.merges):
            if left not in known or right not in known:
                raise DataError(
                    f"merge {rank} joins {left!r} and {right!r}; expected tokens of earlier merges or bytes"
                )
            known.add(left + right)
        if unknown := sorted(self.scaffolds - {left + right for left, right in self.merges}):
            raise DataError(f"scaffolds: {unknown[0]!r} is made by no merge; expected merged tokens only")

    @cached_property
    def expanded(self) -> tuple[bytes, ...]:
        """The single bytes, then all merged tokens by rank."""
        return tuple(dict.fromkeys((*self.base, *(left + right for left, right in self.merges))))

    @cached_property
    def tokens(self) -> tuple[bytes, ...]:
        """The normal tokens in the order of their ids: the single bytes, then merged tokens by rank."""
        return tuple(token for token in self.expanded if token not in self.scaffolds)

    @cached_property
    def demolished(self) -> dict[bytes, tuple[bytes, ...]]:
        """The normal tokens that stand for each scaffold: it is split as it was merged, until no part is one."""
        pieces: dict[bytes, tuple[bytes, ...]] = {}
        for left, right in self.merges:
            if left + right in self.scaffolds:
                pieces.setdefault(left + right, (*pieces.get(left, (left,)), *pieces.get(right, (right,))))
        return pieces

    @cached_property
    def _ranks(self) -> dict[tuple[bytes, bytes], int]:
        ranks: dict[tuple[bytes, bytes], int] = {}
        for rank, pair in enumerate(self.merges):
            ranks.setdefault(pair, rank)
        return ranks

    def encode_word(self, word: bytes) -> list[bytes]:
        """The normal tokens of a pre-token (algorithm 2 of Scaffold-BPE; ordinary BPE without scaffolds).

        Merges of the lowest rank come first, whatever the kind of token they make; then scaffolds are demolished. Plain
        and exact; takes time in the square of the word's length.

        Args:
            word: a pre-token.
        """
        parts = [word[place : place + 1] for place in range(len(word))]
        while True:
            known = [pair for pair in pairwise(parts) if pair in self._ranks]
            if not known:
                return [piece for part in parts for piece in self.demolished.get(part, (part,))]
            parts = merged(parts, min(known, key=self._ranks.__getitem__))


def merged(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """The parts with a pair joined wherever it occurs, from the left."""
    joined: list[bytes] = []
    place = 0
    while place < len(parts):
        if tuple(parts[place : place + 2]) == pair:
            joined.append(pair[0] + pair[1])
            place += 2
        else:
            joined.append(parts[place])
            place += 1
    return joined
