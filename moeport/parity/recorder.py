"""Names what a pass computes, and notes the inputs of each tensor; see `moeport.parity.recording_ops`."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from typing_extensions import override

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.parity.recording import FLOATS, SAMPLE_SIZE, Keep, Kind, TensorRecord
from moeport.parity.store import Store, TensorInfo

LAYOUT = "layout"
"""The operation that is named for an argument with the entries of other tensors in another layout."""
Arrays = Sequence[tuple[str, Array]]
"""Arrays among the arguments of an operation, each with its name."""


class Probe(Protocol):
    """Reads or replaces the inputs of one operation; see `moeport.parity.isolate`."""

    operation: str
    """Its recorded name."""

    def arguments(self, ops: Ops, arrays: Arrays) -> Mapping[str, Array]:
        """Arrays to pass to the operation instead of its own, by argument."""


class Recorder:
    """Collects the tensors of passes.

    Args:
        keep: how much of each kind is kept; see `Store`. Default: everything.
        replay: decisions by name that are used instead of the model's own.
        sample_size: entries of a sampled tensor.
        probe: reads or replaces the inputs of one operation.
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
        self._moved: dict[int, weakref.ref[Any]] = {}
        self._paths: dict[tuple[int | None, tuple[str, ...]], str] = {}

    @property
    def active(self) -> bool:
        """Whether it records; if not, a model can skip its recording code."""
        return self._active

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """The records so far; statistics may be missing until `finish`."""
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
        """Stop recording."""
        self._active = False

    def follow(self, decisions: Mapping[str, np.ndarray]) -> None:
        """From now on, use these decisions by name instead of the model's own."""
        self._replay = dict(decisions)

    def take(self) -> dict[str, TensorRecord]:
        """Return what `finish` returns, and start over."""
        self._forget()
        return self._store.take()

    def finish(self) -> dict[str, TensorRecord]:
        """End a pass; returns the tensors with all statistics."""
        self._forget()
        return self._store.finish()

    def _forget(self) -> None:
        self._sources.clear()
        self._moved.clear()
        self._counts.clear()

    @contextmanager
    def layer(self, layer: int) -> Iterator[None]:
        """A context in which records belong to a block."""
        self._layer = layer
        with self.scope(f"layers.{layer}"):
            yield
        self._layer = None

    @contextmanager
    def scope(self, name: str, router: bool = False) -> Iterator[None]:
        """A context in which recorded names start with `name`; floats of a router are scores."""
        self._scope.append(name)
        self._router = router
        yield
        self._scope.pop()
        self._router = False

    def name_arrays(self, prefix: str, arrays: Mapping[str, Array]) -> None:
        """Name some arrays, so that operations that read them can be named after them."""
        for name, array in arrays.items():
            self.trace(array, (f"{prefix}:{name}",))

    def add(self, ops: Ops, name: str, kind: Kind, array: Array, inputs: Sequence[str] = ()) -> None:
        """Record an array in the current scope as `SCOPE:name`."""
        self.store(ops, f"{self._path}:{name}", kind, array, None, tuple(inputs) or self.sources(array))
        self.trace(array, (f"{self._path}:{name}",))

    def put(self, name: str, kind: Kind, values: np.ndarray, dtype: str | None = None) -> None:
        """Record an array of the host under a full name."""
        values = np.asarray(values)
        self.put_record(
            TensorRecord(name, kind, dtype or str(values.dtype), values.shape, _layer_of(name), values=values)
        )

    def put_record(self, record: TensorRecord) -> None:
        """Add a whole record, and keep as much of it as its kind calls for."""
        self._store.put(record)

    def store(
        self,
        ops: Ops,
        name: str,
        kind: Kind,
        array: Array,
        op: str | None,
        inputs: tuple[str, ...],
        dtype: str | None = None,
    ) -> None:
        """Record an array under a full name, with the operation that computed it and the inputs of that operation; as
        one of type `dtype`, if it has been converted.
        """
        self._store.put_array(ops.unrecorded(), TensorInfo(name, kind, self._layer, op, inputs, dtype), array)

    def trace(self, array: Array, sources: tuple[str, ...]) -> None:
        """Remember where an array comes from, for as long as it lives."""
        if is_array(array) and not self.sources(array):
            self._sources[id(array)] = (weakref.ref(array), sources)

    def move(self, array: Array) -> None:
        """Remember that an array has the entries of its sources in another layout."""
        if is_array(array):
            self._moved[id(array)] = weakref.ref(array)

    def is_moved(self, array: Array) -> bool:
        """Whether the layout of an array differs from that of its sources."""
        reference = self._moved.get(id(array))
        return reference is not None and reference() is array

    def sources(self, array: Array) -> tuple[str, ...]:
        """Recorded tensors, parameters and inputs that an array comes from; empty if plain arithmetic computed it."""
        reference, sources = self._sources.get(id(array), (None, ()))
        return sources if reference and reference() is array else ()

    @property
    def _path(self) -> str:
        return "/".join(self._scope) or "model"

    def operation_name(self, op: str, arrays: Arrays) -> str:
        """`SCOPE:op`, or `BLOCK/PARAMETER:op` if an argument is a parameter; `#2` marks a second one of that name."""
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
        """Names of what an operation reads; also records what plain arithmetic has computed, and what other layouts
        hold, unless statistics are kept, which do not show a layout.
        """
        found: list[str] = []
        for label, array in arrays:
            sources, kind = self.sources(array), self._kind(ops, array)
            if not sources:
                self.store(ops, f"{name}.{label}", kind, array, "arithmetic", ())
                self.trace(array, (f"{name}.{label}",))
                sources = (f"{name}.{label}",)
            elif self.is_moved(array) and self._store.keep.get(kind) != "statistics":
                self.store(ops, f"{name}.{label}", kind, array, LAYOUT, sources)
                own = (f"{name}.{label}",)
                if not any(source.startswith("parameter:") for source in sources):  # these name operations
                    self._sources[id(array)] = (weakref.ref(array), own)
                    del self._moved[id(array)]
                sources = own
            found += [source for source in sources if source not in found]
        return tuple(found)

    def output(self, ops: Ops, name: str, op: str, out: Array | tuple[Array, ...], inputs: tuple[str, ...]) -> None:
        """Record the result of an operation."""
        arrays = out if isinstance(out, tuple) else (out,)
        for i, array in enumerate(arrays):
            own = f"{name}[{i}]" if isinstance(out, tuple) else name
            self.store(ops, own, self._kind(ops, array), array, op, inputs)
            self.trace(array, (own,))

    def decide(self, ops: Ops, name: str, op: str, chosen: Array, inputs: tuple[str, ...]) -> Array:
        """Record the model's own decision; returns the one to use: the replayed one, if any."""
        self.store(ops, name, "decision", chosen, op, inputs)
        used = chosen
        if name in self._replay and self._replay[name].size == math.prod(chosen.shape):
            used = ops.from_numpy(self._replay[name].reshape(chosen.shape))
        self.trace(used, (name,))
        return used

    def score(self, ops: Ops, name: str, array: Array) -> str:
        """Record in full what a decision is made from; returns its name."""
        self.store(ops, f"{name}.x", "score", array, None, self.sources(array))
        return f"{name}.x"

    def _kind(self, ops: Ops, array: Array) -> Kind:
        if ops.dtype(array) not in FLOATS:
            return "plan"
        return "score" if self._router else "activation"


class Replayer(Recorder):
    """Passes decisions on, and keeps nothing."""

    @override
    def store(
        self,
        ops: Ops,
        name: str,
        kind: Kind,
        array: Array,
        op: str | None,
        inputs: tuple[str, ...],
        dtype: str | None = None,
    ) -> None:
        pass


def is_array(value: Any) -> bool:
    """Whether a value is an array with at least one dimension; scalars are numbers on some backends."""
    return bool(getattr(value, "shape", ()))


def _owner(names: Sequence[str]) -> str:
    """The common prefix of dotted names: `moe.experts` of `moe.experts.w_in` and `moe.experts.w_out`."""
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
