"""Names what a pass computes and notes what each tensor was made of; see `moeport.parity.recording_ops`."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.parity.recording import FLOATS, SAMPLE_SIZE, Keep, Kind, TensorRecord
from moeport.parity.store import Described, Store

Arrays = Sequence[tuple[str, Array]]
"""Arrays among the arguments of an operation, each with its name."""


class Probe(Protocol):
    """What is done at one operation, besides recording it; see `moeport.parity.isolate`."""

    operation: str
    """Name on record."""

    def arguments(self, ops: Ops, arrays: Arrays) -> Mapping[str, Array]:
        """Arrays that the operation is given in the place of its own, by argument."""


class Recorder:
    """Collects the tensors of passes.

    Args:
        keep: how much of each kind is kept; see `Store`. Default: all.
        replay: decisions by name that are used in the place of one's own.
        sample_size: entries of a sampled tensor.
        probe: what is done at one operation.
    """

    def __init__(
        self,
        keep: Mapping[str, Keep] | None = None,
        replay: Mapping[str, np.ndarray] | None = None,
        sample_size: int = SAMPLE_SIZE,
        probe: Probe | None = None,
    ):
        self.probe = probe
        self._store = Store(keep or {}, sample_size)
        self._replay = dict(replay or {})
        self._active = True
        self._parameters: list[str] = []
        self._scope: list[str] = []
        self._layer: int | None = None
        self._router = False
        self._counts: Counter[str] = Counter()
        self._sources: dict[int, tuple[weakref.ref[Any], tuple[str, ...]]] = {}
        self._paths: dict[tuple[int | None, tuple[str, ...]], str] = {}

    @property
    def active(self) -> bool:
        """Whether it records; a model that asks finds out that it need not."""
        return self._active

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """What is on record so far; statistics may be missing until `finish`."""
        return self._store.tensors

    @property
    def sample_size(self) -> int:
        """Entries of a sampled tensor."""
        return self._store.sample_size

    @property
    def parameters(self) -> Sequence[str]:
        """Names of the parameters in the order of their first use."""
        return [source.removeprefix("parameter:") for source in self._parameters]

    def stop(self) -> None:
        """Record nothing from here on."""
        self._active = False

    def follow(self, decisions: Mapping[str, np.ndarray]) -> None:
        """From here on, use these decisions by name in the place of one's own."""
        self._replay = dict(decisions)

    def take(self) -> dict[str, TensorRecord]:
        """What `finish` returns, and begin anew."""
        self._forget()
        return self._store.take()

    def finish(self) -> dict[str, TensorRecord]:
        """End a pass: returns the tensors, with all statistics."""
        self._forget()
        return self._store.finish()

    def _forget(self) -> None:
        self._sources.clear()
        self._counts.clear()

    @contextmanager
    def layer(self, layer: int) -> Iterator[None]:
        """What is recorded inside belongs to a block."""
        self._layer = layer
        with self.scope(f"layers.{layer}"):
            yield
        self._layer = None

    @contextmanager
    def scope(self, name: str, router: bool = False) -> Iterator[None]:
        """What is recorded inside has this name in front; floats of a router are scores."""
        self._scope.append(name)
        self._router = router
        yield
        self._scope.pop()
        self._router = False

    def name_arrays(self, prefix: str, arrays: Mapping[str, Array]) -> None:
        """Say what some arrays are, so that operations that read them can be named after them."""
        for name, array in arrays.items():
            self.trace(array, (f"{prefix}:{name}",))

    def add(self, ops: Ops, name: str, kind: Kind, array: Array, inputs: Sequence[str] = ()) -> None:
        """Record an array under the present scope: `SCOPE:name`."""
        self.store(ops, f"{self._path}:{name}", kind, array, None, tuple(inputs) or self.sources(array))
        self.trace(array, (f"{self._path}:{name}",))

    def put(self, name: str, kind: Kind, values: np.ndarray, dtype: str | None = None) -> None:
        """Record an array of the host under a name of its own."""
        values = np.asarray(values)
        self.put_record(
            TensorRecord(name, kind, dtype or str(values.dtype), values.shape, _layer_of(name), values=values)
        )

    def put_record(self, record: TensorRecord) -> None:
        """Take in a whole record, and keep of it what is wanted of its kind."""
        self._store.put(record)

    def store(self, ops: Ops, name: str, kind: Kind, array: Array, op: str | None, inputs: tuple[str, ...]) -> None:
        """Record an array under a name of its own, with the operation that made it and what that read."""
        self._store.put_array(ops.unrecorded(), Described(name, kind, self._layer, op, inputs), array)

    def trace(self, array: Array, sources: tuple[str, ...]) -> None:
        """Remember where an array comes from, for as long as it lives."""
        if is_array(array) and not self.sources(array):
            self._sources[id(array)] = (weakref.ref(array), sources)

    def sources(self, array: Array) -> tuple[str, ...]:
        """Recorded tensors, parameters and inputs that an array is made of; empty if arithmetic made it."""
        reference, sources = self._sources.get(id(array), (None, ()))
        return sources if reference and reference() is array else ()

    @property
    def _path(self) -> str:
        return "/".join(self._scope) or "model"

    def operation_name(self, op: str, arrays: Arrays) -> str:
        """`SCOPE:op`, or `BLOCK/PARAMETER:op` where an argument is a parameter; `#2` marks the second of a name."""
        read = [source for _, array in arrays for source in self.sources(array) if source.startswith("parameter:")]
        name = f"{self._owner_path(tuple(read)) if read else self._path}:{op}"
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}#{self._counts[name]}"

    def _owner_path(self, read: tuple[str, ...]) -> str:
        """`BLOCK/PARAMETER` for the parameters that an operation reads, which are noted in the order of their use."""
        key = (self._layer, read)
        if key not in self._paths:
            self._parameters += [source for source in read if source not in self._parameters]
            owner = _owner([source.removeprefix("parameter:").removesuffix(".weight") for source in read])
            block = f"layers.{self._layer}"
            self._paths[key] = owner if self._layer is None else f"{block}/{owner.removeprefix(f'{block}.')}"
        return self._paths[key]

    def inputs(self, ops: Ops, name: str, arrays: Arrays) -> tuple[str, ...]:
        """Names of what an operation reads; records what plain arithmetic has made since."""
        found: list[str] = []
        for label, array in arrays:
            if not self.sources(array):
                self.store(ops, f"{name}.{label}", self._kind(ops, array), array, "arithmetic", ())
                self.trace(array, (f"{name}.{label}",))
            found += [source for source in self.sources(array) if source not in found]
        return tuple(found)

    def output(self, ops: Ops, name: str, op: str, out: Array | tuple[Array, ...], inputs: tuple[str, ...]) -> None:
        """Record what an operation gave."""
        arrays = out if isinstance(out, tuple) else (out,)
        for i, array in enumerate(arrays):
            own = f"{name}[{i}]" if isinstance(out, tuple) else name
            self.store(ops, own, self._kind(ops, array), array, op, inputs)
            self.trace(array, (own,))

    def decide(self, ops: Ops, name: str, op: str, chosen: Array, inputs: tuple[str, ...]) -> Array:
        """Record one's own decision; returns the one to use, which is the replayed one if there is one."""
        self.store(ops, name, "decision", chosen, op, inputs)
        used = chosen
        if name in self._replay and self._replay[name].size == math.prod(chosen.shape):
            used = ops.from_numpy(self._replay[name].reshape(chosen.shape))
        self.trace(used, (name,))
        return used

    def score(self, ops: Ops, name: str, array: Array) -> str:
        """Record what a decision is made from, whole; returns its name."""
        self.store(ops, f"{name}.x", "score", array, None, self.sources(array))
        return f"{name}.x"

    def _kind(self, ops: Ops, array: Array) -> Kind:
        if ops.dtype(array) not in FLOATS:
            return "plan"
        return "score" if self._router else "activation"


def is_array(value: Any) -> bool:
    """Whether a value is an array of one dimension at least; scalars are numbers on some backends."""
    return bool(getattr(value, "shape", ()))


def _owner(names: Sequence[str]) -> str:
    """What dotted names have in common: `moe.experts` of `moe.experts.w_in` and `moe.experts.w_out`."""
    common = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _layer_of(name: str) -> int | None:
    """The block that a dotted parameter name belongs to."""
    _, found, rest = name.partition("layers.")
    return int(rest.partition(".")[0]) if found else None
