"""Compiled functions: `mindspore.jit` in trace capture, made safe and quick to call.

Gradients are taken outside of the trace: a traced gradient function returns stale gradients from the second call on.
A trace has further traps in MindSpore 2.10, to which this module is pinned:

* It is kept under the `id` of the function and the shapes of its arguments. When a traced function is deleted, the next
  one at its address runs its graph. So traced functions live forever.
* Whatever a function closes over is baked in; what changes must be an argument.
* Custom gradients are ignored.
* Each operation reads the source line of every caller, which fails where there is none (`python -m`, `python -c`) and
  takes most of the compile time. So no source is looked up.
* Each call prints all its arguments into debug messages that are then thrown away. So a compiled graph is run directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore.graph import api, jit_trace
from mindspore.graph.jit_config import _DEFAULT_JIT_CONFIG

_immortal: list[Callable[..., Any]] = []


class Compilations:
    """How often, and how long, something was compiled."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0


def compiled(fn: Callable[..., Any], compilations: Compilations) -> Callable[..., Any]:
    """`fn` as a graph, traced once for given shapes and types of its arguments.

    Args:
        fn: a pure function of tensors that returns a tuple of tensors.
        compilations: counts the traces, and the seconds of the first calls.
    """
    phases: dict[tuple[Any, ...], str] = {}
    traced_phase = ""

    def traced(*args: Any) -> Any:
        nonlocal traced_phase
        traced_phase = jit_trace._trace_jit_context.phase
        return fn(*args)

    _immortal.append(traced)
    compile_and_run = ms.jit(traced, capture_mode="trace")

    def run(*args: Any) -> Any:
        phase = phases.get(_signature(args))
        if phase is None:
            start = time.perf_counter()
            jit_trace._get_caller_lines = lambda: ([__file__], [1])
            out = compile_and_run(*args)
            phases[_signature(args)] = traced_phase
            compilations.count += 1
            compilations.seconds += time.perf_counter() - start
            return out
        return api._convert_python_data(jit_trace.tr.get_instance().run_graph(phase, _DEFAULT_JIT_CONFIG, args))

    return run


def _signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (api._PyNativeExecutor().requires_grad(), *((x.shape, x.dtype) for x in args))
