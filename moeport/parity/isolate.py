"""Runs one operation of B on A's inputs, to see whether an error is its own or inherited."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.parity.metrics import measure
from moeport.parity.passes import forward
from moeport.parity.record import decisions
from moeport.parity.recorder import Arrays, Recorder
from moeport.parity.recording import FLOATS, Recording
from moeport.parity.result import Isolation
from moeport.parity.subject import Subject
from moeport.parity.thresholds import LIMITS, coarser, limit_of


class Capture:
    """Captures what an operation reads; see `Probe`.

    Args:
        operation: its recorded name.
    """

    def __init__(self, operation: str):
        self.operation = operation
        self.arrays: dict[str, np.ndarray] | None = None
        """Arrays by argument; None until the operation runs."""

    def arguments(self, ops: Ops, arrays: Arrays) -> Mapping[str, Array]:
        """Replaces nothing."""
        self.arrays = {label: ops.to_numpy(array) for label, array in arrays}
        return {}


class Substitute:
    """Passes other arrays to an operation, each cast to the type of the one it replaces; see `Probe`.

    Args:
        operation: its recorded name.
        arrays: arrays by argument.
    """

    def __init__(self, operation: str, arrays: Mapping[str, np.ndarray]):
        self.operation, self._arrays = operation, arrays

    def arguments(self, ops: Ops, arrays: Arrays) -> Mapping[str, Array]:
        """The replacements."""
        return {label: self._cast_like(ops, label, old) for label, old in arrays if label in self._arrays}

    def _cast_like(self, ops: Ops, label: str, old: Array) -> Array:
        new, dtype = ops.from_numpy(self._arrays[label]), ops.dtype(old)
        return ops.cast(new, dtype) if dtype in FLOATS else new


def isolate_operation(first: Subject, other: Subject, a: Recording, name: str) -> Isolation | None:
    """Run one operation of `other` on the inputs it has in `first`; None if no operation of `first` has that output.

    Args:
        first: the reference.
        other: the subject compared with it.
        a: the recording of `first`; the routing of both follows it.
        name: an output of the operation.
    """
    captured = Capture(name.partition("[")[0])
    forward(first, Recorder(replay=decisions(a), probe=captured))
    if captured.arrays is None:
        return None
    target = Recorder(replay=decisions(a), probe=Substitute(captured.operation, captured.arrays))
    forward(other, target)
    got, want = target.tensors[name], a.tensors[name]
    assert got.values is not None
    assert want.values is not None
    metrics = measure(want.values, got.values, coarser(want.dtype, got.dtype))
    stored, computed = coarser(want.dtype, got.dtype), coarser(first.backend.dtype, other.backend.dtype)
    own = metrics.relative_rms > limit_of(want.kind, computed, stored) or metrics.mean_ulp > LIMITS[stored].isolated_ulp
    return Isolation(name, metrics.relative_rms, metrics.mean_ulp, own)
