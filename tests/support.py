"""Numbers and comparisons that several test packages use."""

import numpy as np


def rng(seed=0):
    return np.random.default_rng(seed)


def grid(seed, *shape):
    """Random multiples of 1/32 in (-2, 2): the same numbers in bfloat16, float32 and float64."""
    return rng(seed).integers(-63, 64, shape) / 32


def assert_close(got, want, tolerance, label=""):
    """Equal up to `tolerance` relative to the element or, near 0, to the largest finite element of `want`."""
    want = np.asarray(want)
    finite = np.abs(want[np.isfinite(want)], dtype=np.float64)
    scale = finite.max() if finite.size else 0.0
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale, err_msg=label)


def finite_difference(fn, x, step=1e-5):
    """Gradient of the scalar `fn` at the float64 array `x` by central differences."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        values = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            values.append(fn(moved))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient
