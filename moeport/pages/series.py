"""Time series of any length, stored in a bounded number of points."""

from __future__ import annotations

import numpy as np


class BinnedSeries:
    """Mean, minimum and maximum over equal ranges of steps, which double in width whenever there are too many.

    NaNs and infinities are ignored.

    Args:
        columns: values per step.
        bins: maximum number of ranges; even.
    """

    def __init__(self, columns: int, bins: int):
        self.width = 1
        """Steps per range."""
        self._bins = bins
        self._sum, self._count = np.zeros((bins, columns)), np.zeros((bins, columns))
        self._low, self._high = np.full((bins, columns), np.nan), np.full((bins, columns), np.nan)

    def add(self, step: int, values: np.ndarray) -> None:
        """Adds the values (columns,) of `step`, which counts from 1."""
        while (step - 1) // self.width >= self._bins:
            self._merge_pairs()
        row = (step - 1) // self.width
        finite = np.isfinite(values)
        values = np.where(finite, values, np.nan)
        self._sum[row] += np.where(finite, values, 0)
        self._count[row] += finite
        np.fmin(self._low[row], values, out=self._low[row])
        np.fmax(self._high[row], values, out=self._high[row])

    @property
    def mean(self) -> np.ndarray:
        """Means (ranges with values, columns); NaN where a column has no value."""
        with np.errstate(invalid="ignore"):
            return self._sum[self._used] / self._count[self._used]

    @property
    def low(self) -> np.ndarray:
        """Minima, of the same shape as `mean`."""
        return self._low[self._used]

    @property
    def high(self) -> np.ndarray:
        """Maxima, of the same shape as `mean`."""
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
        self.width *= 2
