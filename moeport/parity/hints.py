"""Hints on what a difference looks like, for tensors that fail."""

from __future__ import annotations

import math

import numpy as np

from moeport.parity.metrics import relative_rms

SHOWN = 4
"""Maximum number of rows to name."""
LEFT = 0.25
"""A factor explains a difference if at most this share of it is left. Ours."""


def hint(a: np.ndarray, b: np.ndarray, limit: float) -> str | None:
    """The simplest relation between two arrays of the same shape that are too far apart; None if none is found.

    Args:
        a: the reference.
        b: the other.
        limit: relative RMS error that counts as equal.
    """
    if not np.isfinite(a).all() or not np.isfinite(b).all() or not a.size:
        return None
    x, y = a.astype(np.float64), b.astype(np.float64)
    if not y.any():
        return "B is zero"
    if x.ndim >= 2 and x.shape[-1] == x.shape[-2] and relative_rms(np.swapaxes(x, -1, -2), y) <= limit:
        return "B is A transposed"
    return _factor(x, y, limit) or _rows(x, y, limit) or _rounded(a, b)


def _factor(x: np.ndarray, y: np.ndarray, limit: float) -> str | None:
    """Looks for one factor for all entries."""
    square = float(np.vdot(x, x))
    factor = float(np.vdot(x, y)) / square if square else 0.0
    if x.size < 2 or factor in (0, 1) or relative_rms(factor * x, y) > min(limit, LEFT * relative_rms(x, y)):
        return None
    near = abs(factor - 1)  # its first two digits are shown
    digits = f".{1 - math.floor(math.log10(near))}f" if near < 1e-2 else ".4g"
    return f"B is {factor:{digits}} times A"


def _rows(x: np.ndarray, y: np.ndarray, limit: float) -> str | None:
    """Looks for a minority of rows that differ, along the first dimension or along all but the last."""
    if x.ndim < 2:
        return None
    count = x.shape[0] if x.ndim == 3 or x.shape[0] > 1 else 1
    flat_x, flat_y = x.reshape(count, -1), y.reshape(count, -1)
    scale = np.linalg.norm(x) / count**0.5
    wrong = np.flatnonzero(np.linalg.norm(flat_y - flat_x, axis=1) > limit * scale)
    if not 0 < len(wrong) <= max(1, count // 2) or count == 1:
        return None
    shown = ", ".join(str(row) for row in wrong[:SHOWN]) + (", ..." if len(wrong) > SHOWN else "")
    found = f"{'row' if len(wrong) == 1 else 'rows'} {shown} of {count} {'differs' if len(wrong) == 1 else 'differ'}"
    if not flat_y[wrong].any():
        return f"{found}: B has zeros there"
    if len(wrong) == 2 and relative_rms(flat_x[wrong[::-1]], flat_y[wrong]) <= limit:
        return f"{found}: B has them swapped"
    return found


def _rounded(a: np.ndarray, b: np.ndarray) -> str | None:
    """Looks for entries of B that all fit into bfloat16 while those of A do not."""

    def short(x: np.ndarray) -> bool:
        return bool((np.ascontiguousarray(x, np.float32).view(np.uint32) & 0xFFFF == 0).all())

    if a.size > 1 and short(b) and not short(a) and np.array_equal(b.astype(np.float32), b):
        return "B has only the precision of bfloat16"
    return None
