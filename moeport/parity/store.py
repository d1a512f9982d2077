"""Keeps recorded tensors: all entries, a sample or statistics, by kind."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.parity.recording import FLOATS, Keep, Kind, Statistics, TensorRecord, runs, sample_indices


@dataclass(frozen=True)
class TensorInfo:
    """A tensor without its entries."""

    name: str
    kind: Kind
    layer: int | None = None
    """Index of the block, if it belongs to one."""
    op: str | None = None
    """Operation that computed it; None if it precedes all operations."""
    inputs: tuple[str, ...] = ()
    """Names of what the operation read."""
    dtype: str | None = None
    """Type that it is judged by, if it arrives in a wider one; None: its own."""


class Store:
    """Tensors by name, in the order in which they were added.

    Args:
        keep: how much of each kind is kept; other kinds are kept whole. Integers and booleans are never reduced to
            statistics, but may be sampled.
        sample_size: entries of a sampled tensor.
    """

    def __init__(self, keep: Mapping[str, Keep], sample_size: int):
        self.keep, self.sample_size = dict(keep), sample_size
        self.tensors: dict[str, TensorRecord] = {}
        self._pending: defaultdict[tuple[Ops, bool], list[tuple[dict[str, Any], Array, Array]]] = defaultdict(list)

    def take(self) -> dict[str, TensorRecord]:
        """Return the tensors so far, and empty the store."""
        tensors, self.tensors = self.finish(), {}
        return tensors

    def finish(self) -> dict[str, TensorRecord]:
        """Fetch the statistics, which are still on the device, in one transfer, and return the tensors."""
        for (ops, _), pending in self._pending.items():
            known, means, squares = zip(*pending, strict=True)
            numbers = ops.to_numpy(ops.concat([*means, *squares], axis=0)).tolist()
            for info, mean, square in zip(known, numbers, numbers[len(known) :], strict=False):
                self.tensors[info["name"]] = TensorRecord(**info, statistics=Statistics(mean, square**0.5))
        self._pending.clear()
        return self.tensors

    def put(self, record: TensorRecord) -> None:
        """Add a whole record, and keep as much of it as its kind calls for."""
        values = record.values
        assert values is not None
        kept = self._kept(record.kind, record.is_float, values.size)
        if kept != "full":
            flat = values.reshape(-1)
            sampled = flat[sample_indices(flat.size, self.sample_size)] if kept == "sample" else None
            statistics = statistics_of(flat) if record.is_float else None
            record = replace(record, keep=kept, values=sampled, statistics=statistics)
        self.tensors[record.name] = record

    def put_array(self, ops: Ops, info: TensorInfo, array: Array) -> None:
        """Add an array on the device; `ops` must not record."""
        dtype, shape = info.dtype or ops.dtype(array), tuple(array.shape)
        is_float = dtype in FLOATS
        size = math.prod(shape)
        kept = self._kept(info.kind, is_float, size)
        known: dict[str, Any] = {**vars(info), "dtype": dtype, "shape": shape, "keep": kept}
        if kept == "full":
            self.tensors[info.name] = TensorRecord(**known, values=ops.to_numpy(array))
            return
        if is_float and kept == "statistics" and (here := ops.on_host(array)) is not None:
            self.tensors[info.name] = TensorRecord(**known, statistics=statistics_of(here))
            return
        flat = ops.reshape(ops.stop_gradient(array), (-1,))
        if kept == "sample":
            ids = ops.from_numpy(sample_indices(size, self.sample_size))
            known["values"] = ops.to_numpy(ops.take_rows(flat, ids))
        if not is_float:
            self.tensors[info.name] = TensorRecord(**known)
            return
        # Reduced at once, while the entries are in the cache; only two numbers per tensor stay on the device.
        y = ops.accurate(ops.reshape(runs(flat), (1, -1)))
        self._pending[ops, dtype == "float64"].append((known, ops.mean(y, axis=1), ops.mean(y * y, axis=1)))
        self.tensors[info.name] = _LATER

    def _kept(self, kind: Kind, is_float: bool, size: int) -> Keep:
        wanted = self.keep.get(kind, "full")
        if wanted == "statistics" and not is_float:
            wanted = "sample"
        return "full" if size == 0 or (wanted == "sample" and size <= self.sample_size) else wanted


_LATER = TensorRecord("", "activation", "", ())
"""Placeholder for a record until `finish` has its statistics."""


def statistics_of(values: np.ndarray) -> Statistics:
    """Statistics of an array on the host, computed in float64 unless its type is float32."""
    x = runs(values.reshape(-1)).reshape(-1)
    if x.dtype.char not in "fd":
        x = x.astype(np.float64)
    return Statistics(float(x.sum()) / x.size, math.sqrt(float(x.dot(x)) / x.size))
