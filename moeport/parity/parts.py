"""Joins the recordings of a batch's micro-batches to one recording of the batch.

Micro-batch p of a single process is micro-batch p % k of rank p // k if each rank has k of them, so any number of ranks
yields the same parts in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from safetensors.numpy import load, save

from moeport.comm.communicator import Communicator
from moeport.parity.recording import TensorRecord

ROWS = "rows_E"
"""Name of the operation that counts the rows of each expert; counts are added over the parts."""

Part = dict[str, TensorRecord]
"""The record of one micro-batch: whole tensors by name."""


def join(parts: Sequence[Part]) -> Part:
    """One record per tensor, in the order of the first part.

    Arrays with at least two dimensions are concatenated along the first, so tokens are in the order of the batch.
    Others are stacked to (p, n) and (p,); vectors of unequal lengths are concatenated.
    """
    names = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
    return {name: _joined([part[name] for part in parts]) for name in names}


def _joined(records: Sequence[TensorRecord]) -> TensorRecord:
    first, values = records[0], [np.asarray(record.values) for record in records]
    shapes = {record.shape for record in records}
    if f":{ROWS}" in first.name:
        whole = np.sum(values, axis=0)
    elif len(first.shape) < 2 and len(shapes) == 1:
        whole = np.stack(values)
    else:
        whole = np.concatenate(values)
    return replace(first, shape=whole.shape, values=whole)


def split(values: np.ndarray, parts: int) -> list[np.ndarray]:
    """Undo `join`, except for dimensions of 1."""
    return np.array_split(values, parts)


def gather(world: Communicator, own: Sequence[Part]) -> list[Part]:
    """The parts of all ranks, in the order of the ranks, which all have the same number. Every rank calls it.

    Only entries are sent: everything else in a record is the same on every rank.
    """
    if world.size == 1:
        return list(own)
    entries = {f"{i}/{name}": np.array(t.values, order="C") for i, part in enumerate(own) for name, t in part.items()}
    found = []
    for arrays in map(load, gather_bytes(world, save(entries))):
        found += [_with(part, arrays, f"{i}/") for i, part in enumerate(own)]
    return found


def _with(part: Part, arrays: Mapping[str, np.ndarray], prefix: str) -> Part:
    """Another rank's part: this one with other entries."""
    here = {name: arrays[prefix + name] for name in part if prefix + name in arrays}
    return {name: replace(part[name], shape=values.shape, values=values) for name, values in here.items()}


def gather_bytes(world: Communicator, own: bytes) -> list[bytes]:
    """What every rank passes, in the order of the ranks. Every rank calls it."""
    ops, padded = world.ops, np.frombuffer(own + bytes(-len(own) % 4), np.int32)
    sizes = ops.to_numpy(world.all_gather(ops.from_numpy(np.array([len(own)]))))[:, 0]
    room = np.zeros(-(-int(sizes.max()) // 4), np.int32)
    room[: len(padded)] = padded
    gathered = ops.to_numpy(world.all_gather(ops.from_numpy(room))).astype(np.int32)
    return [row.tobytes()[:size] for row, size in zip(gathered, sizes, strict=True)]
