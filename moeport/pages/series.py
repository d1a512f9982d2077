"""Time series of any length, stored in a bounded number of points."""

from __future__ import annotations

import numpy as np

TOGETHER = 2**15
"""Values that wait before they are added."""


class BinnedSeries:
    """Mean, minimum and maximum over equal ranges of steps, which double in width whenever there are too many.

    NaNs and infinities are ignored.

    Args:
        columns: values per step.
        bins: maximum number of ranges; even.
    """

    def __init__(self, columns: int, bins: int):
        self._width = 1
        self._bins = bins
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._sum, self._count = np.zeros((bins, columns)), np.zeros((bins, columns))
        self._low, self._high = np.full((bins, columns), np.nan), np.full((bins, columns), np.nan)

    def add(self, step: int, values: np.ndarray) -> None:
        """Adds the values (columns,) of `step`, which counts from 1. Raises ValueError for another number of values."""
        if len(values) != self._sum.shape[1]:
            raise ValueError(f"step {step} has {len(values)} values, expected {self._sum.shape[1]}")
        self._waiting.append((step, values))
        if len(self._waiting) * len(values) >= TOGETHER:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Adds what waits, many steps at a time, which is faster."""
        if not self._waiting:
            return
        steps = np.array([step for step, _ in self._waiting])
        values = np.stack([values for _, values in self._waiting])
        self._waiting = []
        while (steps.max() - 1) // self._width >= self._bins:
            self._merge_pairs()
        row = (steps - 1) // self._width
        order = np.argsort(row, kind="stable")
        rows, starts = np.unique(row[order], return_index=True)
        values = values[order]
        finite = np.isfinite(values)
        values = np.where(finite, values, np.nan)
        self._sum[rows] += np.add.reduceat(np.where(finite, values, 0), starts)
        self._count[rows] += np.add.reduceat(finite.astype(float), starts)
        self._low[rows] = np.fmin(self._low[rows], np.fmin.reduceat(values, starts))
        self._high[rows] = np.fmax(self._high[rows], np.fmax.reduceat(values, starts))

    @property
    def width(self) -> int:
        """Steps per range."""
        self._add_waiting()
        return self._width

    @property
    def mean(self) -> np.ndarray:
        """Means (ranges with values, columns); NaN where a column has no value."""
        self._add_waiting()
        with np.errstate(invalid="ignore"):
            return self._sum[self._used] / self._count[self._used]

    @property
    def low(self) -> np.ndarray:
        """Minima, of the same shape as `mean`."""
        self._add_waiting()
        return self._low[self._used]

    @property
    def high(self) -> np.ndarray:
        """Maxima, of the same shape as `mean`."""
        self._add_waiting()
        return self._high[self._used]

    @property
    def _used(self) -> np.ndarray:
        return self._count.sum(axis=1) > 0

    def _merge_pairs(self) -> None:
        half = self._bins // 2
        for values, reduce, empty in (
            (self._sum, np.add, 0.0),
            (self._count, np.add, 0.0),
            (self._low, np.fmin, np.nan),
            (self._high, np.fmax, np.nan),
        ):
            values[:half] = reduce(values[0::2], values[1::2])
            values[half:] = empty
        self._width *= 2
