"""Means over seeds, and paired differences with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit

CONFIDENCE = 0.95
METHOD = (
    f"{CONFIDENCE:.0%} interval of Student's t for the mean of the paired differences: mean ± t(n - 1) · s / √n, with "
    "s their standard deviation over n seeds"
)
"""How an interval is computed."""
Verdict = Literal["higher", "lower", "not resolved", "one seed"]


@dataclass(frozen=True)
class Spread:
    """A value over several seeds."""

    mean: float
    deviation: float | None
    """Standard deviation over the seeds (n - 1); None for a single seed."""


@dataclass(frozen=True)
class Paired:
    """The difference between two configs, or their ratio, over the seeds that both have."""

    mean: float
    deviation: float | None
    """Standard deviation of the differences (n - 1); None for a single pair."""
    low: float | None
    """Lower end of the interval, see METHOD; None for a single pair."""
    high: float | None
    """Upper end of the interval."""
    pairs: int
    """Number of seeds that both have."""
    neutral: float
    """The value of no difference: 0, or 1 for a ratio."""

    @property
    def verdict(self) -> Verdict:
        """Which way the difference goes, where the interval shows it."""
        if self.low is None or self.high is None:
            return "one seed"
        if self.low > self.neutral:
            return "higher"
        return "lower" if self.high < self.neutral else "not resolved"


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def paired(differences: Sequence[float], neutral: float = 0.0) -> Paired:
    """The mean of paired differences with its interval, as METHOD says.

    It assumes that the differences are normally distributed, as Student did; so few seeds cannot tell. With 3 seeds t
    is 4.303, so the interval reaches 2.48 standard deviations to each side.

    Args:
        differences: one per seed, or ratios.
        neutral: the value of no difference.
    """
    found, n = spread(differences), len(differences)
    if found.deviation is None:
        return Paired(found.mean, None, None, None, n, neutral)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * found.deviation / math.sqrt(n)
    return Paired(found.mean, found.deviation, found.mean - half, found.mean + half, n, neutral)
