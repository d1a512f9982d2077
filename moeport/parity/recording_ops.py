"""Operations that record what passes through them.

`RecordingOps` replaces a backend's operations and forwards every call to them. Neutral code receives its `ops`
explicitly, so a model that is not recorded runs exactly as if this module did not exist. A kernel's default composition
runs on the inner operations: only the outermost call is recorded, the same on every backend, fused or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.parity.recorder import Recorder, is_array
from moeport.parity.recording import FLOATS

PASSIVE = (
    *("from_numpy", "to_numpy", "on_host", "constant", "constant_like", "zeros", "index", "arange", "dtype"),
    *("unrecorded", "part", "fuses"),
)
"""Operations that are forwarded but not recorded."""
TRANSPARENT = ("cast", "accurate", "stop_gradient", "reshape", "transpose", "concat", "split", "one_hot")
"""Operations that compute nothing new: their results are traced to their arguments."""
MOVING = ("reshape", "transpose", "concat", "split")
"""Those of them that change the layout."""

ARGUMENTS = {
    name: tuple(inspect.signature(method).parameters)[1:]
    for name, method in vars(Ops).items()
    if callable(method) and not name.startswith("_")
}
"""Names of the arguments of each operation."""


def _forwarded(op: str) -> Any:
    def method(self: RecordingOps, *args: Any, **kwargs: Any) -> Any:
        return self._call(op, args, kwargs)

    method.__name__ = op
    return method


def recorded(ops: Ops, recorder: Recorder) -> Ops:
    """`ops` with recording; unchanged if they already record, or if the recorder is stopped."""
    return RecordingOps(ops, recorder) if recorder.active and ops.unrecorded() is ops else ops


_Forwarding: Any = type("_Forwarding", (Ops,), {op: _forwarded(op) for op in ARGUMENTS})


class RecordingOps(_Forwarding):
    """The operations of a backend, recorded.

    Args:
        inner: the backend's own.
        recorder: takes the records.
    """

    def __init__(self, inner: Ops, recorder: Recorder):
        self.inner, self.recorder = inner, recorder
        for op in PASSIVE:
            setattr(self, op, getattr(inner, op))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def routed_mlp(self, *args: Any, **kwargs: Any) -> Array:
        """Records its parts, which are the same on every backend, and also the result of a fused form."""
        y_TD = Ops.routed_mlp(self, *args, **kwargs)
        fuses = self.inner.fuses("routed_mlp", self.inner.dtype(y_TD))
        return self._call("routed_mlp", args, kwargs) if fuses else y_TD

    def inverse(self, order_N: Array) -> Array:
        """Records its default composition, so that a recording does not depend on how a backend sorts."""
        return Ops.inverse(self, order_N)

    def sort_by_group(self, group_N: Array, groups: int) -> tuple[Array, Array, Array]:
        """As `inverse`."""
        return Ops.sort_by_group(self, group_N, groups)

    def _call(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inner, recorder = self.inner, self.recorder
        if op in TRANSPARENT:
            return self._traced(op, args, kwargs)
        arrays = _arrays(op, args, kwargs)
        name = recorder.operation_name(op, arrays)
        if recorder.probe and recorder.probe.operation == name:
            args, kwargs = _with(op, args, kwargs, recorder.probe.arguments(inner, arrays))
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
            moved = op in MOVING or any(recorder.is_moved(array) for _, array in _arrays(op, args, kwargs))
            for array in out if isinstance(out, (list, tuple)) else (out,):
                recorder.trace(array, tuple(sources))
                if moved:
                    recorder.move(array)
        return out


def _with(
    op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], arrays: Mapping[str, Array]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with some arrays, given by name, replaced, also inside dataclasses."""

    def substitute(label: str, old: Any) -> Any:
        if is_dataclass(old) and not isinstance(old, type):
            return replace(old, **{f.name: substitute(f.name, getattr(old, f.name)) for f in fields(old)})
        return arrays[label] if label in arrays and is_array(old) else old

    positional = tuple(substitute(label, arg) for label, arg in zip(ARGUMENTS[op], args, strict=False))
    return positional, {key: substitute(key, value) for key, value in kwargs.items()}


def _arrays(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Array]]:
    """The arrays among the arguments of an operation, by name, also those in sequences and dataclasses."""
    found: list[tuple[str, Array]] = []
    for label, value in (*zip(ARGUMENTS[op], args, strict=False), *kwargs.items()):
        if is_array(value):
            found.append((label, value))
        elif isinstance(value, (list, tuple)):
            found += [(f"{label}{i}", item) for i, item in enumerate(value) if is_array(item)]
        elif is_dataclass(value) and not isinstance(value, type):
            found += [(f.name, x) for f in fields(value) if is_array(x := getattr(value, f.name))]
    return found
