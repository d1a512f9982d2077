"""Which part of each parameter this rank holds, and how it is filled and given out without the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Sharded

from moeport.comm.mesh import Mesh
from moeport.core.parameters import BLOCK_ENTRIES, ParameterSpec
from moeport.core.weights import Box, Shard, read_part

PIECE_ENTRIES = 8 * BLOCK_ENTRIES
"""Most entries that are on the host at a time while a parameter is filled; the blocks of initial values in it are drawn
at the same time."""


@dataclass(frozen=True)
class Held:
    """What this rank holds of a parameter."""

    whole: tuple[int, ...]
    """Shape of the parameter."""
    box: Box
    """The part of it that is here."""
    copy: int
    """Number of this copy of the part, from 0."""
    copies: int
    """How many ranks have this part."""

    def fill(self, target: Tensor, arrays: Mapping[str, np.ndarray], name: str) -> None:
        """Read the part from a named array into a tensor of its shape."""
        for box in self.box.pieces(PIECE_ENTRIES):
            piece = np.require(read_part(arrays, name, box), requirements="W")
            target[box.within(self.box).slices].copy_(torch.from_numpy(piece))

    def shard(self, name: str, x: Tensor) -> Shard:
        """What this rank is to write of the part: all of it, or, of several copies, its share. The array may be empty.

        Args:
            name: name of the array.
            x: the part; on the CPU the result is a view of it.
        """
        box = self.box.share(self.copy, self.copies)
        return Shard(name, self.whole, box, x.detach()[box.within(self.box).slices].cpu().numpy())


def held(x: Tensor, spec: ParameterSpec, mesh: Mesh) -> Held:
    """What this rank holds of a parameter.

    Args:
        x: the tensor of a module that has been distributed.
        spec: the parameter.
        mesh: the ranks.
    """
    if isinstance(x, DTensor):
        return held_of_sharded(x, spec.shape, mesh.box(spec))
    group = mesh.copies if spec.is_expert else mesh.world
    return Held(spec.shape, mesh.box(spec), group.rank, group.size)


def held_of_sharded(x: DTensor, whole: tuple[int, ...], box: Box) -> Held:
    """What this rank holds of a part of a parameter that is divided in a plain way (`is_plain`).

    Args:
        x: the part, as a tensor that is distributed.
        whole: shape of the parameter.
        box: which part of it that is.
    """
    copy, copies = 0, 1
    for dim, placement in enumerate(x.placements):
        size, rank = x.device_mesh.size(dim), x.device_mesh.get_local_rank(dim)
        if isinstance(placement, Sharded):
            box = divided(box, placement.dim, rank, size)
        else:
            copy, copies = copy * size + rank, copies * size
    return Held(whole, box, copy, copies)


def is_plain(x: DTensor) -> bool:
    """Whether a tensor is replicated and divided along dimensions, and in no other way."""
    return all(type(placement) in (Sharded, Replicate) for placement in x.placements)


def divided(box: Box, dim: int, rank: int, ranks: int) -> Box:
    """What a rank holds of a part, as torch.chunk cuts a dimension: all but the last chunks are equally long."""
    size = box.shape[dim]
    step = -(-size // ranks)
    first = min(rank * step, size)
    return box.along(dim, first, min(step, size - first))
