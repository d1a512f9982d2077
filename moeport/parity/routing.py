"""Compares decisions: where they differ, and whether a near tie or a fault is the cause."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np

from moeport.parity.recording import TensorRecord
from moeport.parity.result import MAX_FLIPS, Flip, RoutingResult

Cause = Literal["near tie", "other scores", "unexplained"]


def compare_decision(
    a: TensorRecord,
    free: TensorRecord,
    replayed: TensorRecord | None,
    scores_a: np.ndarray | None,
    scores_b: np.ndarray | None,
    limit: float,
) -> RoutingResult:
    """Compare one decision.

    Args:
        a: A's decision.
        free: B's decision when it follows its own routing.
        replayed: B's own decision after following A's routing up to it; None without a replay.
        scores_a: the scores that A chose from, (..., E); None if they were not recorded or the decision is a condition.
        scores_b: the scores that B chose from in `replayed`, or else in `free`.
        limit: relative error of scores that rounding may cause.

    Returns: the result. Shapes must agree.
    """
    judged = replayed or free
    flips: list[Flip] = []
    if scores_a is None or scores_b is None:
        causes = _condition_causes(_rows(a), _rows(judged), limit)
    else:
        flips = _flips(a.op, (_rows(a), _rows(judged)), (scores_a, scores_b), limit)
        causes = Counter(flip.cause for flip in flips)
    flips.sort(key=lambda flip: (flip.cause != "unexplained", -flip.gap))
    return RoutingResult(
        name=a.name,
        layer=a.layer,
        op=a.op,
        rows=_rows(a).shape[0],
        choices=a.size,
        agreement=_agreement(_rows(a), _rows(free)),
        agreement_replayed=_agreement(_rows(a), _rows(replayed)) if replayed else None,
        near_ties=causes["near tie"],
        other_scores=causes["other scores"],
        unexplained=causes["unexplained"],
        flips=flips[:MAX_FLIPS],
        flipped_rows=_differing(_rows(a), _rows(free)),
        flipped_rows_replayed=_differing(_rows(a), _rows(replayed)) if replayed else None,
    )


def _flips(
    op: str | None, chosen: tuple[np.ndarray, np.ndarray], scores: tuple[np.ndarray, np.ndarray], limit: float
) -> list[Flip]:
    """Finds every choice that differs, with its cause.

    Args:
        op: the operation that made the choices.
        chosen: choices of both sides, (rows, K).
        scores: the scores that they were made from, (..., E).
        limit: relative error of scores that rounding may cause.
    """
    x_a, x_b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in scores)
    chosen_a, chosen_b = chosen
    if op == "argsort":
        chosen_a, chosen_b = chosen_a.reshape(x_a.shape), chosen_b.reshape(x_a.shape)
        sound = _sorted(x_b, chosen_b)
    else:
        expected = np.argsort(-x_b, axis=-1, kind="stable")[:, : chosen_b.shape[1]]
        sound = (expected == chosen_b).all(axis=1)
    finite = x_a[np.isfinite(x_a)]
    near = 2 * limit * float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    flips = []
    for row, choice in np.argwhere(chosen_a != chosen_b):
        i, j = int(chosen_a[row, choice]), int(chosen_b[row, choice])
        gap, error = _gap(x_a[row, i], x_a[row, j]), _gap(x_a[row, i], x_b[row, i]) + _gap(x_a[row, j], x_b[row, j])
        cause: Cause = "near tie" if gap <= near else "other scores"
        flips.append(Flip(int(row), int(choice), i, j, gap, error, cause if sound[row] else "unexplained"))
    return flips


def _condition_causes(a: np.ndarray, b: np.ndarray, limit: float) -> Counter[Cause]:
    """Causes for a condition, which has no recorded margin: rounding may move some entries across the threshold."""
    differ = int((a != b).sum())
    cause: Cause = "near tie" if differ <= max(1, limit * a.size) else "other scores"
    return Counter({cause: differ})


def _sorted(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Whether each row of indices sorts its scores, ascending or descending, with ties by index."""
    steps = np.diff(np.take_along_axis(x, order, axis=1), axis=1)
    tied = (steps == 0) & (np.diff(order, axis=1) < 0)
    return ((steps >= 0).all(axis=1) | (steps <= 0).all(axis=1)) & ~tied.any(axis=1)


def _rows(record: TensorRecord) -> np.ndarray:
    """Choices as (rows, K); a sample or a vector has one choice per row."""
    assert record.values is not None
    values = record.values
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)


def _differing(a: np.ndarray, b: np.ndarray) -> list[int]:
    return np.flatnonzero((a != b).any(axis=1)).tolist()


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((a == b).mean()) if a.size else 1.0


def _gap(x: float, y: float) -> float:
    """|x - y|, and 0 between equal infinities."""
    return 0.0 if x == y else float(abs(x - y))
