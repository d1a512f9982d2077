"""One operation of B on the inputs that it has in A: whether an error is its own or was handed on."""

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
    """Holds what an operation reads; see `Probe`.

    Args:
        operation: its name on record.
    """

    def __init__(self, operation: str):
        self.operation = operation
        self.arrays: dict[str, np.ndarray] | None = None
        """By argument; None while the operation has not come by."""

    def arguments(self, ops: Ops, arrays: Arrays) -> Mapping[str, Array]:
        """See Probe; replaces nothing."""
        self.arrays = {label: ops.to_numpy(array) for label, array in arrays}
        return {}


class Substitute:
    """Gives an operation other arrays, each in the type of the one it replaces; see `Probe`.

    Args:
        operation: its name on record.
        arrays: by argument.
    """

    def __init__(self, operation: str, arrays: Mapping[str, np.ndarray]):
        self.operation, self._arrays = operation, arrays

    def arguments(self, ops: Ops, arrays: Arrays) -> Mapping[str, Array]:
        """See Probe."""
        return {label: self._like(ops, label, old) for label, old in arrays if label in self._arrays}

    def _like(self, ops: Ops, label: str, old: Array) -> Array:
        new, dtype = ops.from_numpy(self._arrays[label]), ops.dtype(old)
        return ops.cast(new, dtype) if dtype in FLOATS else new


def isolate_operation(first: Subject, other: Subject, a: Recording, name: str) -> Isolation | None:
    """Run one operation of `other` on the inputs it has in `first`; None where it is no operation of its own.

    Args:
        first: the reference.
        other: what is held against it.
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
