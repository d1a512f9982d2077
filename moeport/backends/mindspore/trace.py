"""Compiled functions: `mindspore.jit` with trace capture, made safe and fast to call.

Gradients are taken outside the trace: a traced gradient function returns stale gradients from the second call on.
Traces have further traps in MindSpore 2.10, to which this module is pinned:

* A trace is cached by the `id` of the function and the shapes of its arguments. When a traced function is deleted, the
  next one at its address runs the old graph. So traced functions are never deleted.
* Whatever a function closes over is baked in; what changes must be an argument.
* Custom gradients are ignored.
* Each operation looks up the source line of every caller, which fails if there is none (`python -m`, `python -c`) and
  takes most of the compile time. So no source is looked up.
* Each call formats all its arguments for debug messages that are then discarded. So a compiled graph is run directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mindspore as ms

from moeport.backends.mindspore import private

_never_deleted: list[Callable[..., Any]] = []


class Compilations:
    """Number and duration of compilations."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0


def compiled(fn: Callable[..., Any], compilations: Compilations) -> Callable[..., Any]:
    """`fn` as a graph, traced once per combination of shapes and types of its arguments.

    Args:
        fn: a pure function of tensors that returns a tuple of tensors.
        compilations: counts the traces and the seconds that first calls took.
    """
    phases: dict[tuple[Any, ...], str] = {}
    traced_phase = ""

    def traced(*args: Any) -> Any:
        nonlocal traced_phase
        traced_phase = private.traced_phase()
        return fn(*args)

    _never_deleted.append(traced)
    compile_and_run = ms.jit(traced, capture_mode="trace")

    def run(*args: Any) -> Any:
        phase = phases.get(_signature(args))
        if phase is None:
            start = time.perf_counter()
            private.look_up_no_sources(__file__)
            out = compile_and_run(*args)
            phases[_signature(args)] = traced_phase
            compilations.count += 1
            compilations.seconds += time.perf_counter() - start
            return out
        return private.run_graph(phase, args)

    return run


def _signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (private.records_gradients(), *((x.shape, x.dtype) for x in args))
