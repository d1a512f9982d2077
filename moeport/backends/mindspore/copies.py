"""Copies of parameters on several ranks: their gradients added, and updates divided among the ranks that hold them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor
from mindspore import ops as msops

from moeport.backends.mindspore.division import Bucket, Piece
from moeport.backends.mindspore.ops import numpy_type, zeros
from moeport.backends.mindspore.placing import put
from moeport.comm.communicator import Communicator
from moeport.comm.mesh import Mesh


class Copies:
    """What this rank updates and writes of the parameters that it holds.

    Args:
        mesh: the ranks.
        buckets: the parameters that ranks hold alike.
        params: the local parameters by name, one-dimensional.
        divides: each rank updates its share and gets the rest from the others, which is ZeRO's first stage (Rajbhandari
            et al. 2020, arXiv 1910.02054); otherwise every rank updates all that it holds.
    """

    def __init__(self, mesh: Mesh, buckets: Sequence[Bucket], params: Mapping[str, Parameter], divides: bool):
        self.mesh, self.params, self.divides = mesh, params, divides
        self.written = [(bucket, bucket.own(self._ranks(bucket).rank)) for bucket in buckets]
        """The share of this rank in each bucket."""
        self._trained = [(bucket, own) for bucket, own in self.written if bucket.trainable]
        names = dict.fromkeys(piece.name for bucket, _ in self._trained for piece in bucket.pieces)
        shares = [piece for _, own in self._trained for piece in own]
        self.updated: list[Piece] = shares if divides else [Piece(name, 0, params[name].size) for name in names]
        """What this rank updates."""

    def _ranks(self, bucket: Bucket) -> Communicator:
        return self.mesh.copies if bucket.is_expert else self.mesh.world

    def held(self, piece: Piece, updated: Mapping[str, Parameter]) -> tuple[Parameter, Piece]:
        """Where a piece that this rank writes is in arrays of what it updates: the array, and the range in it."""
        if self.divides:
            return updated[piece.key], Piece(piece.name, 0, piece.count)
        return updated[Piece(piece.name, 0, 0).key], piece

    def summed(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum over ranks of the gradients of what this rank updates, by its key; `gradients` is emptied.

        Gradients travel by bucket, in buffers of bounded size.
        """
        found: dict[str, Tensor] = {}
        totals: dict[str, list[Tensor]] = {}
        for bucket, own in self._trained:
            if bucket.ranks == 1:
                continue
            mine = [gradients[piece.name][piece.slice] for piece in bucket.pieces]
            flat = _joined(mine, bucket.padding, mine[0].dtype)
            if not self.divides:
                for piece, part in _apart(bucket.pieces, self._ranks(bucket).all_reduce(flat)):
                    totals.setdefault(piece.name, []).append(part)
                continue
            found |= {piece.key: part for piece, part in _apart(own, self._ranks(bucket).reduce_scatter(flat))}
            for piece in bucket.pieces:
                if piece.first + piece.count == self.params[piece.name].size:
                    del gradients[piece.name]
        for name in list(gradients):
            found[Piece(name, 0, 0).key] = _joined(totals[name]) if name in totals else gradients[name]
            del gradients[name]
        return found

    def update(self, gradients: Mapping[str, Tensor], rule: Callable[[str, Parameter, Tensor], None]) -> None:
        """Update parameters; every rank calls it.

        Args:
            gradients: of what this rank updates, by key.
            rule: updates a piece in place, given its key and gradient.
        """
        if not self.divides:
            for piece in self.updated:
                rule(piece.key, self.params[piece.name], gradients[piece.key])
            return
        for bucket, own in self._trained:
            parts = {piece.key: self._part(piece) for piece in own}
            for key, part in parts.items():
                rule(key, part, gradients[key])
            if bucket.ranks > 1:
                for piece, values in self._from_all(bucket, own, parts):
                    put(self.params[piece.name], piece, values)

    def _part(self, piece: Piece) -> Parameter:
        """The parameter itself, if the piece is all of it; otherwise a copy of the piece."""
        p = self.params[piece.name]
        return p if piece.count == p.size else Parameter(p[piece.slice], name=piece.key)

    def local(self, updated: Mapping[str, Tensor], names: Collection[str]) -> dict[str, np.ndarray]:
        """What this rank would hold if no updates were divided, by name, one-dimensional; every rank calls it.

        Args:
            updated: arrays for what this rank updates, by key.
            names: of the parameters that have such arrays; of a bucket all or none.
        """
        found = {name: np.empty(self.params[name].size, numpy_type(self.params[name].dtype)) for name in names}
        for bucket, own in self._trained if self.divides else ():
            if bucket.ranks > 1 and bucket.pieces[0].name in found:
                for piece, values in self._from_all(bucket, own, updated):
                    found[piece.name][piece.slice] = values.asnumpy()
        for piece in self.updated:
            if piece.name in found and piece.count == self.params[piece.name].size:
                found[piece.name][:] = updated[piece.key].asnumpy()
        return found

    def _from_all(
        self, bucket: Bucket, own: Sequence[Piece], parts: Mapping[str, Tensor]
    ) -> Iterator[tuple[Piece, Tensor]]:
        """All pieces of a bucket, from the share of each rank."""
        share = [parts[piece.key] for piece in own]
        kind = self.params[bucket.pieces[0].name].dtype
        flat = _joined(share, bucket.share - sum(piece.count for piece in own), kind)
        return _apart(bucket.pieces, msops.reshape(self._ranks(bucket).all_gather(flat), (-1,)))


def _joined(parts: Sequence[Tensor], padding: int = 0, kind: Any = None) -> Tensor:
    """Arrays one behind the other, and zeros of a type."""
    return msops.concat([*parts, zeros((padding,), kind)] if padding else [*parts])


def _apart(pieces: Sequence[Piece], flat: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """The part of each piece of an array in which they lie one behind the other."""
    first = 0
    for piece in pieces:
        yield piece, flat[first : first + piece.count]
        first += piece.count
