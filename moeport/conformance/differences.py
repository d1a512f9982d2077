"""Gradients by finite differences, and how far from them a gradient may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

STEP = 2.0**-14
"""Of finite differences: small enough for steep functions, large enough that rounding divided by it is some 1e-11."""
UNITS = 64
"""Rounding errors of a function that a comparison allows for, in eps times the size of what the function adds up."""


@dataclass(frozen=True)
class Slopes:
    """A gradient by finite differences."""

    value: np.ndarray
    error: np.ndarray
    """How far off each entry of `value` may be."""
    plain: float
    """The function's size over that of its argument: a slope if nothing cancelled."""


def finite_difference(fn: Callable[..., Any], x: np.ndarray, step: float = STEP) -> Slopes:
    """Gradient of the scalar `fn` at the float64 array `x` by central differences, and how far off they may be.

    Two widths cancel the truncation of second order (Richardson). The truncation that remains is to the cancelled one
    as that is to the slope. `fn` is as exact as its inputs and result are, to `UNITS`; the step divides that.

    Raises AssertionError where the widths disagree, as they do across a kink: choose another `x`.
    """
    x = np.asarray(x, np.float64)
    near, far, largest = np.empty_like(x), np.empty_like(x), 0.0
    for index in np.ndindex(x.shape):
        for slopes, width in ((near, step), (far, 2 * step)):
            above, below = x.copy(), x.copy()
            above[index] += width
            below[index] -= width
            high, low = float(fn(above)), float(fn(below))
            slopes[index] = (high - low) / (above[index] - below[index])
            largest = max(largest, abs(high), abs(low))
    truncation, scale = np.abs(near - far) / 3, np.abs(near).max(initial=0.0)
    size = largest + np.abs(near * x).sum()
    rounding = 1.5 * UNITS * np.finfo(np.float64).eps * size / step
    assert (truncation <= 1e-3 * scale + rounding).all(), f"a kink, or too wide a step: {near} and {far}"
    error = rounding + truncation**2 / (scale or 1.0)
    return Slopes(near + (near - far) / 3, error, size / max(np.abs(x).max(initial=0.0), 1.0))


def gradient_limit(got: np.ndarray, want: Slopes, tolerance: float) -> np.ndarray:
    """How far `got` may be from the finite differences `want`: by their own error, by `tolerance` relative to the
    element or to the largest, and by 4 roundings of what may have cancelled in it.
    """
    scale = np.abs(want.value).max(initial=0.0)
    cancelled = 4 * np.finfo(np.asarray(got).dtype).eps * want.plain
    limit: np.ndarray = want.error + tolerance * (np.abs(want.value) + scale) + cancelled
    return limit
