"""The numbers that cases compute with."""

from __future__ import annotations

import numpy as np


def rng(seed: int | tuple[int, ...] = 0) -> np.random.Generator:
    """A generator of numbers."""
    return np.random.default_rng(seed)


def grid(seed: int, *shape: int) -> np.ndarray:
    """Random multiples of 1/32 in (-2, 2), float64: the same numbers in bfloat16, float32 and float64."""
    return rng(seed).integers(-63, 64, shape) / 32
