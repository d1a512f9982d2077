"""Marks in a trace: which part of the step computes. Only a profile makes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch

from moeport.backends.torch.ops import TorchOps
from moeport.core.ops import KERNELS

MARK = "part: "
"""Beginning of the name of a mark."""
STEP, PAUSE = "profiled step", "pause of the profile"
"""Names of the ranges around steps, and around what is not counted between them."""
_open: list[str] = []


def open_parts() -> tuple[str, ...]:
    """The parts that compute now, the outermost first."""
    return tuple(_open)


class Mark:
    """A range in the trace of the profiler; a context manager."""

    def __init__(self, part: str):
        self.part, self._range = part, torch.profiler.record_function(MARK + part)

    def __enter__(self) -> None:
        _open.append(self.part)
        self._range.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._range.__exit__(kind, error, trace)
        _open.pop()


@contextmanager
def marking(ops: TorchOps) -> Iterator[None]:
    """Let operations mark the parts of the step, and every kernel, while the block runs.

    The object changes its class, so that whoever holds it marks too, and pays nothing before and afterwards.
    """
    plain = type(ops)
    ops.__class__ = _marking(plain)
    try:
        yield
    finally:
        ops.__class__ = plain


@functools.cache
def _marking(plain: type[TorchOps]) -> type[TorchOps]:
    """A class of the same operations that marks."""

    def part(self: TorchOps, name: str) -> AbstractContextManager[None]:
        return nullcontext() if torch.compiler.is_compiling() else Mark(name)

    def marked(kernel: str) -> Callable[..., Any]:
        inner = getattr(plain, kernel)

        @functools.wraps(inner)
        def run(self: TorchOps, *args: Any, **options: Any) -> Any:
            with self.part(kernel):
                return inner(self, *args, **options)

        return run

    return type(f"Marking{plain.__name__}", (plain,), {"part": part} | {name: marked(name) for name in KERNELS})
