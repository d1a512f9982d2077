"""Records what passes through `Ops`, without the model knowing.

`RecordingOps` stands in the place of a backend's operations and forwards every call. Neutral code receives its `ops`
explicitly, so a model that is not recorded runs exactly as if this module did not exist. A kernel's default composition
runs on the inner operations: the outermost call is what is recorded, the same on every backend, fused or not.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.parity.recording import (
    FLOATS,
    SAMPLE_SIZE,
    Keep,
    Kind,
    Statistics,
    TensorRecord,
    runs,
    sample_indices,
)

PASSIVE = (
    *("from_numpy", "to_numpy", "on_host", "constant", "constant_like", "zeros", "index", "arange", "dtype"),
    "unrecorded",
)
"""Operations that are forwarded and forgotten."""
TRANSPARENT = ("cast", "accurate", "stop_gradient", "reshape", "transpose", "concat", "split", "one_hot")
"""Operations that compute nothing new: what they return is traced to what they were given."""

ARGUMENTS = {
    name: tuple(inspect.signature(method).parameters)[1:]
    for name, method in vars(Ops).items()
    if callable(method) and not name.startswith("_")
}
"""Every operation with the names of its arguments."""


class Recorder:
    """Collects the tensors of one pass.

    Args:
        keep: how much of each kind is kept; what is not named is kept whole. Integers and booleans are never reduced
            to statistics, but to samples.
        replay: decisions by name that are used in the place of one's own.
        sample_size: entries of a sampled tensor.
    """

    def __init__(
        self,
        keep: Mapping[str, Keep] | None = None,
        replay: Mapping[str, np.ndarray] | None = None,
        sample_size: int = SAMPLE_SIZE,
    ):
        self.keep = dict(keep or {})
        self.replay = dict(replay or {})
        self.sample_size = sample_size
        self.tensors: dict[str, TensorRecord] = {}
        self.active = True
        """While False, `ops` gives the operations as they are and nothing is recorded."""
        self.parameter_order: list[str] = []
        """Parameters in the order of their first use."""
        self.capture: str | None = None
        """Name of an operation whose arguments `captured` shall hold."""
        self.captured: dict[str, np.ndarray] | None = None
        self.substitute: tuple[str, dict[str, np.ndarray]] | None = None
        """Name of an operation, and arrays that it shall be given in the place of its own, by argument."""
        self._scope: list[str] = []
        self._layer: int | None = None
        self._router = False
        self._counts: Counter[str] = Counter()
        self._sources: dict[int, tuple[weakref.ref[Any], tuple[str, ...]]] = {}
        self._pending: defaultdict[tuple[Ops, bool], list[tuple[dict[str, Any], Array, Array]]] = defaultdict(list)
        self._recording: RecordingOps | None = None
        self._paths: dict[tuple[int | None, tuple[str, ...]], str] = {}

    def ops(self, ops: Ops) -> Ops:
        """`ops`, recorded while this is active."""
        if not self.active or isinstance(ops, RecordingOps):
            return ops
        if self._recording is None or self._recording.inner is not ops:
            self._recording = RecordingOps(ops, self)
        return self._recording

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
        self.keep_record(
            TensorRecord(name, kind, dtype or str(values.dtype), values.shape, _layer_of(name), values=values)
        )

    def keep_record(self, record: TensorRecord) -> None:
        """Take in a whole record, and keep of it what is wanted of its kind."""
        values = record.values
        assert values is not None
        kept = self._kept(record.kind, record.is_float, values.size)
        if kept != "full":
            flat = values.reshape(-1)
            sampled = flat[sample_indices(flat.size, self.sample_size)] if kept == "sample" else None
            statistics = statistics_of(flat) if record.is_float else None
            record = replace(record, keep=kept, values=sampled, statistics=statistics)
        self.tensors[record.name] = record

    def take(self) -> dict[str, TensorRecord]:
        """What `finish` returns, and begin anew."""
        tensors, self.tensors = self.finish(), {}
        return tensors

    def finish(self) -> dict[str, TensorRecord]:
        """Fetch the statistics, which are still on the device, in one transfer, and return the tensors."""
        for (ops, _), pending in self._pending.items():
            known, means, squares = zip(*pending, strict=True)
            numbers = ops.to_numpy(ops.concat([*means, *squares], axis=0)).tolist()
            for described, mean, square in zip(known, numbers, numbers[len(known) :], strict=False):
                self.tensors[described["name"]] = TensorRecord(**described, statistics=Statistics(mean, square**0.5))
        self._pending.clear()
        self._sources.clear()
        self._counts.clear()
        return self.tensors

    def trace(self, array: Array, sources: tuple[str, ...]) -> None:
        """Remember where an array comes from, for as long as it lives."""
        if _is_array(array) and not self.sources(array):
            self._sources[id(array)] = (weakref.ref(array), sources)

    def sources(self, array: Array) -> tuple[str, ...]:
        """Recorded tensors, parameters and inputs that an array is made of; empty if arithmetic made it."""
        reference, sources = self._sources.get(id(array), (None, ()))
        return sources if reference and reference() is array else ()

    @property
    def _path(self) -> str:
        return "/".join(self._scope) or "model"

    def operation_name(self, op: str, arrays: Sequence[tuple[str, Array]]) -> str:
        """`SCOPE:op`, or `BLOCK/PARAMETER:op` where an argument is a parameter; `#2` marks the second of a name."""
        read = [source for _, array in arrays for source in self.sources(array) if source.startswith("parameter:")]
        name = f"{self._owner_path(tuple(read)) if read else self._path}:{op}"
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}#{self._counts[name]}"

    def _owner_path(self, read: tuple[str, ...]) -> str:
        """`BLOCK/PARAMETER` for the parameters that an operation reads, which are noted in the order of their use."""
        key = (self._layer, read)
        if key not in self._paths:
            self.parameter_order += [source for source in read if source not in self.parameter_order]
            owner = _owner([source.removeprefix("parameter:").removesuffix(".weight") for source in read])
            block = f"layers.{self._layer}"
            self._paths[key] = owner if self._layer is None else f"{block}/{owner.removeprefix(f'{block}.')}"
        return self._paths[key]

    def inputs(self, ops: Ops, name: str, arrays: Sequence[tuple[str, Array]]) -> tuple[str, ...]:
        """Names of what an operation reads; records what plain arithmetic has made since."""
        found: list[str] = []
        for label, array in arrays:
            if not self.sources(array):
                is_float = ops.dtype(array) in FLOATS
                kind = self._float_kind if is_float else "plan"
                self.store(ops, f"{name}.{label}", kind, array, "arithmetic", ())
                self.trace(array, (f"{name}.{label}",))
            found += [source for source in self.sources(array) if source not in found]
        return tuple(found)

    def output(self, ops: Ops, name: str, op: str, out: Array, inputs: tuple[str, ...]) -> None:
        """Record what an operation gave."""
        several = isinstance(out, tuple)
        for i, array in enumerate(out if several else (out,)):
            own = f"{name}[{i}]" if several else name
            kind = self._float_kind if ops.dtype(array) in FLOATS else "plan"
            self.store(ops, own, kind, array, op, inputs)
            self.trace(array, (own,))

    def decide(self, ops: Ops, name: str, op: str, chosen: Array, inputs: tuple[str, ...]) -> Array:
        """Record one's own decision; returns the one to use, which is the replayed one if there is one."""
        self.store(ops, name, "decision", chosen, op, inputs)
        used = chosen
        if name in self.replay and self.replay[name].size == math.prod(chosen.shape):
            used = ops.from_numpy(self.replay[name].reshape(chosen.shape))
        self.trace(used, (name,))
        return used

    def score(self, ops: Ops, name: str, array: Array) -> str:
        """Record what a decision is made from, whole; returns its name."""
        self.store(ops, f"{name}.x", "score", array, None, self.sources(array))
        return f"{name}.x"

    @property
    def _float_kind(self) -> Kind:
        return "score" if self._router else "activation"

    def _kept(self, kind: Kind, is_float: bool, size: int) -> Keep:
        wanted = self.keep.get(kind, "full")
        if wanted == "statistics" and not is_float:
            wanted = "sample"
        return "full" if size == 0 or (wanted == "sample" and size <= self.sample_size) else wanted

    def store(self, ops: Ops, name: str, kind: Kind, array: Array, op: str | None, inputs: tuple[str, ...]) -> None:
        """Record an array under a name of its own, with the operation that made it and what that read."""
        if isinstance(ops, RecordingOps):
            ops = ops.inner
        dtype, shape = ops.dtype(array), tuple(array.shape)
        is_float = dtype in FLOATS
        size = math.prod(shape)
        kept = self._kept(kind, is_float, size)
        if kept == "full":
            whole = ops.to_numpy(array)
            self.tensors[name] = TensorRecord(name, kind, dtype, shape, self._layer, op, inputs, kept, whole)
            return
        described: dict[str, Any] = {
            "name": name,
            "kind": kind,
            "dtype": dtype,
            "shape": shape,
            "layer": self._layer,
            "op": op,
            "inputs": inputs,
            "keep": kept,
        }
        if is_float and kept == "statistics" and (here := ops.on_host(array)) is not None:
            self.tensors[name] = TensorRecord(**described, statistics=statistics_of(here))
            return
        flat = ops.reshape(ops.stop_gradient(array), (-1,))
        if kept == "sample":
            ids = ops.from_numpy(sample_indices(size, self.sample_size))
            described["values"] = ops.to_numpy(ops.take_rows(flat, ids))
        if not is_float:
            self.tensors[name] = TensorRecord(**described)
            return
        # Reduced at once, while the entries are in the cache; what is kept on the device is two numbers a tensor.
        y = ops.accurate(ops.reshape(runs(flat), (1, -1)))
        self._pending[ops, dtype == "float64"].append((described, ops.mean(y, axis=1), ops.mean(y * y, axis=1)))
        self.tensors[name] = _LATER


_LATER = TensorRecord("", "activation", "", ())
"""Keeps the place of a record until `finish` has its statistics."""


def statistics_of(values: np.ndarray) -> Statistics:
    """Statistics of an array of the host, computed in float64 if its type is neither that nor float32."""
    x = runs(values.reshape(-1)).reshape(-1)
    if x.dtype.char not in "fd":
        x = x.astype(np.float64)
    return Statistics(float(x.sum()) / x.size, math.sqrt(float(x.dot(x)) / x.size))


def _forwarded(op: str) -> Any:
    def method(self: RecordingOps, *args: Any, **kwargs: Any) -> Any:
        return self._call(op, args, kwargs)

    method.__name__ = op
    return method


_Forwarding: Any = type("_Forwarding", (Ops,), {op: _forwarded(op) for op in ARGUMENTS})


class RecordingOps(_Forwarding):
    """The operations of a backend, recorded.

    Args:
        inner: the backend's own.
        recorder: where records go.
    """

    def __init__(self, inner: Ops, recorder: Recorder):
        self.inner, self.recorder = inner, recorder
        for op in PASSIVE:
            setattr(self, op, getattr(inner, op))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def routed_mlp(self, *args: Any, **kwargs: Any) -> Array:
        """See Ops. Its parts are on record, the same on every backend, and a fused form with its own result."""
        y_TD = Ops.routed_mlp(self, *args, **kwargs)
        fuses = type(self.inner).routed_mlp is not Ops.routed_mlp
        return self._call("routed_mlp", args, kwargs) if fuses else y_TD

    def _call(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inner, recorder = self.inner, self.recorder
        if op in TRANSPARENT:
            return self._traced(op, args, kwargs)
        arrays = _arrays(op, args, kwargs)
        name = recorder.operation_name(op, arrays)
        if recorder.capture == name:
            recorder.captured = {label: inner.to_numpy(array) for label, array in arrays}
        if recorder.substitute and recorder.substitute[0] == name:
            args, kwargs = self._substituted(op, args, kwargs, recorder.substitute[1])
        if op == "where":
            condition = recorder.decide(inner, f"{name}.condition", op, args[0], recorder.sources(args[0]))
            args, arrays = (condition, *args[1:]), [("condition", condition), *arrays[1:]]
        decides = op == "topk_ids" or (op == "argsort" and inner.dtype(args[0]) in FLOATS)
        inputs = recorder.inputs(inner, name, arrays) if not decides else (recorder.score(inner, name, args[0]),)
        out = getattr(inner, op)(*args, **kwargs)
        if decides:
            return recorder.decide(inner, name, op, out, inputs)
        recorder.output(inner, name, op, out, inputs)
        return out

    def _traced(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inner, recorder = self.inner, self.recorder
        if op == "cast" and inner.dtype(args[0]) == "bool":
            name = recorder.operation_name(op, ())
            args = (recorder.decide(inner, name, op, args[0], recorder.sources(args[0])), *args[1:])
        out = getattr(inner, op)(*args, **kwargs)
        sources = dict.fromkeys(s for _, array in _arrays(op, args, kwargs) for s in recorder.sources(array))
        if sources:
            for array in out if isinstance(out, list) else (out,):
                recorder.trace(array, tuple(sources))
        return out

    def _substituted(
        self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[str, np.ndarray]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with arrays replaced, each in its own type."""

        def place(label: str, old: Any) -> Any:
            if is_dataclass(old) and not isinstance(old, type):
                return replace(old, **{f.name: place(f.name, getattr(old, f.name)) for f in fields(old)})
            if label not in values or not _is_array(old):
                return old
            new, dtype = self.inner.from_numpy(values[label]), self.inner.dtype(old)
            return self.inner.cast(new, dtype) if dtype in FLOATS else new

        placed = tuple(place(label, arg) for label, arg in zip(ARGUMENTS[op], args, strict=False))
        return placed, {key: place(key, value) for key, value in kwargs.items()}


def _is_array(value: Any) -> bool:
    """Whether a value is an array of one dimension at least; scalars are numbers on some backends."""
    return bool(getattr(value, "shape", ()))


def _arrays(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Array]]:
    """The arrays among the arguments of an operation, by name, those in sequences and dataclasses too."""
    found: list[tuple[str, Array]] = []
    for label, value in (*zip(ARGUMENTS[op], args, strict=False), *kwargs.items()):
        if _is_array(value):
            found.append((label, value))
        elif isinstance(value, (list, tuple)):
            found += [(f"{label}{i}", item) for i, item in enumerate(value) if _is_array(item)]
        elif is_dataclass(value) and not isinstance(value, type):
            found += [(f.name, x) for f in fields(value) if _is_array(x := getattr(value, f.name))]
    return found


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
