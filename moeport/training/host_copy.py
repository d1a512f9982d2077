"""The parts of a model that a rank writes: as they are in the model, or copied while training waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from moeport.backends.base import EvaluationModel, TrainingModel
from moeport.core.parameters import is_expert
from moeport.core.weights import Box, Shard
from moeport.training.checkpoint_index import KINDS, blocks
from moeport.training.checkpoint_writing import NewPart, bytes_of, part_of
from moeport.training.tensor_file import CODES

Parts = list[list[NewPart]]
"""For each of KINDS, what a rank writes."""


def shards_of(model: TrainingModel, kind: str, rank: int) -> Iterable[Shard]:
    """What a rank is to write of the parameters or of the optimiser's state; every rank calls it."""
    shards = model.shards() if kind == "model" else model.optimizer_shards()
    return shards if _divides(model) or rank == 0 else ()


class HostCopy:
    """Copies of shards in host memory, which are used again for the next checkpoint.

    Args:
        model: what is copied.
        rank: this rank.
    """

    def __init__(self, model: TrainingModel, rank: int):
        self._model, self._rank = model, rank
        self._arrays: dict[tuple[str, Box], np.ndarray] = {}

    def take(self) -> tuple[Parts, str | None]:
        """Copy all shards; returns them, and the name of the first array that is not finite."""
        parts: Parts = [[], []]
        broken = None
        for kind, copied in zip(KINDS, parts, strict=True):
            for shard in shards_of(self._model, kind, self._rank):
                array = self._arrays.get((shard.name, shard.box))
                if array is None:
                    array = self._arrays[shard.name, shard.box] = np.empty(shard.array.shape, shard.array.dtype)
                if not _copied(shard, array):
                    broken = broken or shard.name
                copied.append(part_of(Shard(shard.name, shard.whole, shard.box, array)))
        return parts, broken


class Live:
    """Shards as they are in the model, which are looked at and then written one by one, so that no two are held.

    Args:
        model: what is written; it must not change until it is.
        rank: this rank.
    """

    def __init__(self, model: TrainingModel, rank: int):
        self._model, self._rank = model, rank
        self.num_bytes = 0
        """Bytes of all of them, once they were looked at."""

    def take(self) -> tuple[Parts, str | None]:
        """Look at all shards; returns what to write, in this order, and the first array that is not finite."""
        parts: Parts = [[], []]
        self.num_bytes, broken = 0, None
        for kind, live in zip(KINDS, parts, strict=True):
            shards = shards_of(self._model, kind, self._rank)
            if _divides(self._model):
                waiting = self._again(kind)
            else:
                shards = list(shards)  # what was gathered on all ranks once
                waiting = iter(shards)
            for shard in shards:
                self.num_bytes += shard.array.nbytes
                if not broken and not _is_finite(shard):
                    broken = shard.name
                code = CODES[shard.array.dtype.name]
                live.append(NewPart(shard.name, code, shard.whole, shard.box, partial(_next, waiting)))
        return parts, broken

    def _again(self, kind: str) -> Iterator[Shard]:
        yield from shards_of(self._model, kind, self._rank)


def _divides(model: TrainingModel) -> bool:
    """Whether ranks give out parts of their own, rather than each the whole."""
    return type(model).shards is not EvaluationModel.shards


def non_finite_part(shards: Iterable[Shard]) -> str | None:
    """Name of the first shard with a NaN or an infinity; None if there is none."""
    return next((shard.name for shard in shards if not _is_finite(shard)), None)


def _next(waiting: Iterator[Shard]) -> Iterator[memoryview]:
    return bytes_of(next(waiting))


def _copied(shard: Shard, target: np.ndarray) -> bool:
    """Copy a shard block by block, so that what is looked at is still in the cache; whether all of it is finite."""
    is_finite = True
    for block in _slices(shard):
        np.copyto(target[block], shard.array[block])
        is_finite = is_finite and bool(np.isfinite(target[block]).all())
    return is_finite


def _is_finite(shard: Shard) -> bool:
    return all(np.isfinite(shard.array[block]).all() for block in _slices(shard))


def _slices(shard: Shard) -> Iterable[tuple[slice, ...]]:
    return (block.within(shard.box).slices for block in blocks(shard.box, is_expert(shard.name)))
