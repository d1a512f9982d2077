"""Which code encodes: compiled where it can be, else plain Python. Both give the same ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from moeport.errors import DataError, choices
from moeport.tokenizers.definition import Definition
from moeport.tokenizers.plain import PlainEngine

ENGINES = ("auto", "plain", "compiled")


class Engine(Protocol):
    """Encodes bytes."""

    def encode(self, texts: Sequence[bytes], workers: int | None) -> list[np.ndarray]:
        """The ids of each text, uint32; `workers` threads, None: one per processor."""

    def encode_until(self, text: bytes, limit: int) -> tuple[np.ndarray, int]:
        """The ids of the pre-tokens that end at or before this byte, and the end of the last one."""


def engine_of(definition: Definition, choice: str) -> Engine:
    """The engine of a definition.

    Raises:
        DataError: there is no such engine.
    """
    if choice not in ENGINES:
        raise DataError(f"engine: got {choice!r}; {choices(choice, ENGINES)}")
    return PlainEngine(definition)
