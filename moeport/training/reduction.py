"""Reduces the loss terms of micro-batches to those of a whole step, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeport.comm.communicator import Communicator
from moeport.model.loss_terms import COUNTS, FIELDS, LossTerms
from moeport.training.metric import Metric
from moeport.training.metrics_table import PER_LAYER, ROWS, StepMetrics


def whole_step(world: Communicator, parts: Sequence[LossTerms]) -> Any:
    """The terms of a step in float64: over micro-batches and ranks, counts are added and all other terms averaged.

    A capacity is the same in all micro-batches. The layers' measurements are reduced as their rows in the table of
    metrics say, also over the passes.

    Args:
        world: the ranks, all of which call this function.
        parts: the terms of this rank's micro-batches, on the device.

    Returns: LossTerms of numpy arrays.
    """
    names = [*FIELDS, *parts[0].measured]
    added = [name in COUNTS for name in FIELDS] + [_row(name).reduction == "sum" for name in parts[0].measured]
    axes = [0] * len(FIELDS) + [(0, 1)] * len(parts[0].measured)
    local = []
    for values, is_sum, axis in zip(zip(*(part.flat() for part in parts), strict=True), added, axes, strict=True):
        stacked = np.stack([world.ops.to_numpy(value) for value in values]).astype(np.float64)
        local.append(stacked.sum(axis) if is_sum else stacked.mean(axis))
    if world.size > 1:
        local = _over_ranks(world, local, added)
    return LossTerms.from_flat(local, names[len(FIELDS) :])


def measured(terms: Any) -> dict[str, Any]:
    """Metrics that the layers measured, by name: a list with an entry per layer, or one number reduced over the layers.

    Args:
        terms: those of a whole step.
    """
    return {name: _over_layers(name, value_L) for name, value_L in terms.measured.items()}


def _over_ranks(world: Communicator, local: Sequence[np.ndarray], added: Sequence[bool]) -> list[np.ndarray]:
    """Reduce all arrays over the ranks in one collective."""
    sums = world.sum_of_numbers(np.concatenate([value.reshape(-1) for value in local]))
    totals = np.split(sums, np.cumsum([value.size for value in local])[:-1])
    return [
        total.reshape(value.shape) / (1 if is_sum else world.size)
        for total, value, is_sum in zip(totals, local, added, strict=True)
    ]


def _over_layers(name: str, value_L: np.ndarray) -> Any:
    if name in PER_LAYER:
        return value_L.tolist()
    return float(value_L.sum() if _row(name).reduction == "sum" else value_L.mean())


def _row(name: str) -> Metric:
    row = ROWS[StepMetrics].get(name)
    if row is None or row.reduction is None:
        raise LookupError(f"{name}: MoE layers measure it, but it has no row with a reduction in StepMetrics")
    return row
