"""Which experts a vocabulary id goes to: counts, and what they say. For live counts and for `moeport inspect` alike.

Shape suffixes as in `moeport.core.ops`; R are rows that assignments are counted by, such as the X vocabulary ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def assignments_by(row_N: np.ndarray, expert_N: np.ndarray, rows: int, experts: int) -> np.ndarray:
    """Assignments by row and expert (R, E).

    Args:
        row_N: the row of each assignment; R and above: it is not counted.
        expert_N: its expert; E: it is not routed, and not counted.
        rows: R.
        experts: E.
    """
    counted_N = (row_N < rows) & (expert_N < experts)
    found = np.bincount(row_N[counted_N] * experts + expert_N[counted_N], minlength=rows * experts)
    return found.reshape(rows, experts)


@dataclass(frozen=True)
class Spread:
    """How unevenly the rows of a table of counts are divided among the experts: the deviation of the shares."""

    rows: np.ndarray
    """Which rows of the table have enough assignments."""
    deviation: np.ndarray
    """Standard deviation over the experts of each such row's shares; 0 is an even division."""
    chance: float
    """The mean deviation to expect if every assignment of these rows went to an expert by the layer's overall shares
    alone: the root of the expected square. Ours."""

    @property
    def mean(self) -> float:
        """Mean deviation of the rows; NaN without rows."""
        return float(self.deviation.mean()) if len(self.deviation) else float("nan")


def spread(count_RE: np.ndarray, least: int) -> Spread:
    """Deviation of the shares of each row with enough assignments (OpenMoE, arXiv 2402.01739).

    Args:
        count_RE: assignments by anything and expert.
        least: assignments that a row must have to be looked at.
    """
    total_R = count_RE.sum(1)
    rows = np.flatnonzero(total_R >= max(1, least))
    share_RE = count_RE[rows] / total_R[rows, None]
    if not len(rows):
        return Spread(rows, np.zeros(0), float("nan"))
    overall_E = count_RE.sum(0) / count_RE.sum()
    by_sampling_R = (overall_E * (1 - overall_E)).mean() / total_R[rows]
    expected_R = np.sqrt(overall_E.var() + by_sampling_R)
    return Spread(rows, share_RE.std(axis=1), float(expected_R.mean()))


def overlap(count_XE: np.ndarray, other_XE: np.ndarray, least: int) -> float:
    """How much the same token ids go to the same experts: the sum over the experts of the smaller share of two
    histograms, mean over the ids, weighted by how often they occur (OpenMoE, arXiv 2402.01739).

    The measure of overlap is ours.

    Args:
        count_XE: assignments by id and expert.
        other_XE: the same at another time of training.
        least: assignments that an id must have in both.

    Returns: from 0 to 1; NaN if no id occurs that often.
    """
    total_X, other_X = count_XE.sum(1), other_XE.sum(1)
    rows = np.flatnonzero(np.minimum(total_X, other_X) >= max(1, least))
    if not len(rows):
        return float("nan")
    common_X = np.minimum(count_XE[rows] / total_X[rows, None], other_XE[rows] / other_X[rows, None]).sum(1)
    return float(np.average(common_X, weights=total_X[rows]))
