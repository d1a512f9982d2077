"""Numbers and comparisons that several test packages use."""

import sys

import numpy as np

from moeport.conformance.differences import finite_difference, gradient_limit
from moeport.conformance.forms import with_methods
from moeport.conformance.numbers import grid, rng

__all__ = ["assert_close", "assert_gradient", "finite_difference", "grid", "hide_framework", "rng", "with_methods"]


def assert_close(got, want, tolerance, label=""):
    """Equal up to `tolerance` relative to the element or, near 0, to the largest finite element of `want`."""
    want = np.asarray(want)
    finite = np.abs(want[np.isfinite(want)], dtype=np.float64)
    scale = finite.max() if finite.size else 0.0
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale, err_msg=label)


def assert_gradient(got, want, tolerance, label=""):
    """`got`, an array of floats, is the gradient that finite differences `want` give."""
    assert np.shape(got) == want.value.shape
    error, limit = np.abs(np.asarray(got, np.float64) - want.value), gradient_limit(got, want, tolerance)
    assert (error <= limit).all(), (
        f"{label}: off by {error.max():.3g}, at most {np.min(limit):.3g}\n{got}\n{want.value}"
    )


def hide_framework(monkeypatch, name):
    """Until the test ends, `name` is not installed and its backend was never imported.

    A second import would leave its package as the attribute of moeport.backends, without the parts imported before.
    """
    package = f"moeport.backends.{name}"
    if package in sys.modules:
        monkeypatch.setattr(sys.modules["moeport.backends"], name, sys.modules[package])
    for module in [module for module in sys.modules if f"{module}.".startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)


def sampled(shape):
    """Where a gradient is held to finite differences: a third of a matrix, in every row and in every column."""
    return np.indices(shape).sum(0) % 3 == 0
