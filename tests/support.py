"""Numbers and comparisons that several test packages use."""

from dataclasses import dataclass
from typing import Any

import numpy as np


def rng(seed=0):
    return np.random.default_rng(seed)


def with_methods(ops, name, **methods):
    """Operations like these, in a class of that name that has other methods."""
    kind: Any = type(name, (type(ops),), methods)
    other = kind.__new__(kind)
    vars(other).update(vars(ops))
    return other


def grid(seed, *shape):
    """Random multiples of 1/32 in (-2, 2): the same numbers in bfloat16, float32 and float64."""
    return rng(seed).integers(-63, 64, shape) / 32


def assert_close(got, want, tolerance, label=""):
    """Equal up to `tolerance` relative to the element or, near 0, to the largest finite element of `want`."""
    want = np.asarray(want)
    finite = np.abs(want[np.isfinite(want)], dtype=np.float64)
    scale = finite.max() if finite.size else 0.0
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale, err_msg=label)


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


def finite_difference(fn, x, step=STEP):
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


def gradient_limit(got, want, tolerance):
    """How far `got` may be from the finite differences `want`: by their own error, by `tolerance` relative to the
    element or to the largest, and by 4 roundings of what may have cancelled in it.
    """
    scale = np.abs(want.value).max(initial=0.0)
    cancelled = 4 * np.finfo(np.asarray(got).dtype).eps * want.plain
    return want.error + tolerance * (np.abs(want.value) + scale) + cancelled


def assert_gradient(got, want, tolerance, label=""):
    """`got`, an array of floats, is the gradient that finite differences `want` give."""
    assert np.shape(got) == want.value.shape
    error, limit = np.abs(np.asarray(got, np.float64) - want.value), gradient_limit(got, want, tolerance)
    assert (error <= limit).all(), (
        f"{label}: off by {error.max():.3g}, at most {np.min(limit):.3g}\n{got}\n{want.value}"
    )
