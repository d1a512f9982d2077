"""Which code encodes: compiled where it can be, else plain Python. Both give the same ids."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

import numpy as np

from moeport.errors import DataError, choices
from moeport.tokenizers.definition import Definition, expression
from moeport.tokenizers.plain import PlainEngine
from moeport.tokenizers.programs import program_of

ENGINES = ("auto", "plain", "compiled")

WORTH_COMPILING = 4 * 2**20
"""Bytes from which on compiled code is loaded, which takes a second, and ten the first time on a machine."""

FAULTS = (ImportError, OSError)
"""What numba raises where it refuses the version of numpy, or a library of its own cannot be loaded."""


class Engine(Protocol):
    """Encodes bytes."""

    def threads(self, workers: int | None, size: int) -> int:
        """How many threads to use for this many bytes; `workers` None: one per processor."""

    def encode(self, texts: Sequence[bytes], workers: int | None) -> list[np.ndarray]:
        """The ids of each text, uint32."""

    def encode_until(self, text: bytes, limit: int) -> tuple[np.ndarray, int]:
        """The ids of the pre-tokens that end at or before this byte, and the end of the last one."""


def engine_of(definition: Definition, choice: str) -> Engine:
    """The engine of a definition.

    Args:
        definition: the tokenizer.
        choice: "plain"; "compiled", which needs numba and a pattern of the kind in `PATTERNS`; or "auto", plain
            for the first `WORTH_COMPILING` bytes and compiled from then on, where it can be.

    Raises:
        DataError: there is no such engine, or it cannot encode with this pattern here.
    """
    if choice not in ENGINES:
        raise DataError(f"engine: got {choice!r}; {choices(choice, ENGINES)}")
    plain = PlainEngine(definition)
    problem = _why_not_compiled(definition)
    if choice == "plain" or (problem and choice == "auto"):
        return plain
    if problem:
        raise DataError(f"engine: compiled is not possible: {problem}")
    if choice == "auto":
        return _Auto(definition, plain)
    try:
        return _compiled(definition)
    except FAULTS as error:
        raise DataError(f"engine: compiled is not possible: {error}; choose auto") from error


class _Auto:
    """Plain at first, then compiled."""

    def __init__(self, definition: Definition, plain: Engine):
        self._definition, self._engine = definition, plain
        self._left = WORTH_COMPILING
        self._lock = threading.Lock()

    def threads(self, workers: int | None, size: int) -> int:
        """As many as the engine that these bytes are left to."""
        return self._after(size).threads(workers, 0)

    def encode(self, texts: Sequence[bytes], workers: int | None) -> list[np.ndarray]:
        """The ids of each text, uint32."""
        return self._after(sum(map(len, texts))).encode(texts, workers)

    def encode_until(self, text: bytes, limit: int) -> tuple[np.ndarray, int]:
        """The ids of the pre-tokens that end at or before this byte, and the end of the last one."""
        return self._after(len(text)).encode_until(text, limit)

    def _after(self, size: int) -> Engine:
        """The engine to use for this many more bytes."""
        with self._lock:
            if 0 < self._left <= size:
                try:
                    self._engine = _compiled(self._definition)
                except FAULTS as error:
                    warnings.warn(f"encoding is slow: numba is installed, but fails: {error}", stacklevel=4)
            self._left -= size
            return self._engine


def _compiled(definition: Definition) -> Engine:
    from moeport.tokenizers.compiled import CompiledEngine  # loads numba

    program = program_of(expression(definition.pattern))
    assert program is not None
    return CompiledEngine(definition, program)


def _why_not_compiled(definition: Definition) -> str:
    """What is missing; empty: nothing."""
    if find_spec("numba") is None:
        return "numba is not installed; `pip install moeport[tokenizers]`, or choose auto"
    if program_of(expression(definition.pattern)) is None:
        return f"the pattern {definition.pattern!r} needs a library of regular expressions; choose auto"
    return ""
