"""Reduces the loss terms of micro-batches to those of whole steps, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeport.comm.communicator import Communicator
from moeport.core.array import Array
from moeport.model.loss_terms import COUNTS, FIELDS, LossTerms
from moeport.training.metric import Metric
from moeport.training.metrics_table import PER_LAYER, ROWS, StepMetrics


def whole_step(world: Communicator, parts: Sequence[LossTerms]) -> Any:
    """`whole_steps` of one step."""
    return whole_steps(world, [parts])[0][0]


def whole_steps(
    world: Communicator, steps: Sequence[Sequence[LossTerms]], numbers: Sequence[Array] = ()
) -> tuple[list[Any], list[float]]:
    """The terms of steps in float64: over micro-batches and ranks, counts are added and all other terms averaged.

    A capacity is the same in all micro-batches. The layers' measurements are reduced as their rows in the table of
    metrics say, also over the passes; what is kept beside the terms is left out. All arrays come from the device
    together, and over the ranks in one collective.

    Args:
        world: the ranks, all of which call this function.
        steps: for each step the terms of this rank's micro-batches, on the device.
        numbers: further scalars on the device.

    Returns: for each step LossTerms of numpy arrays; the scalars.
    """
    steps = [[part.without_kept()[0] for part in parts] for parts in steps]
    arrays = [value for parts in steps for part in parts for value in part.flat()]
    host = iter(world.ops.fetch([*arrays, *numbers]))
    local = [_over_parts([[next(host) for _ in part.flat()] for part in parts], parts[0]) for parts in steps]
    found = [float(number) for number in host]
    if world.size > 1:
        added = [is_sum for parts in steps for is_sum, _ in _rules(parts[0])]
        reduced = iter(_over_ranks(world, [value for values in local for value in values], added))
        local = [[next(reduced) for _ in values] for values in local]
    return [LossTerms.from_flat(values, parts[0].measured) for values, parts in zip(local, steps, strict=True)], found


def measured(terms: Any) -> dict[str, Any]:
    """Metrics that the layers measured, by name: a list with an entry per layer, or one number reduced over the layers.

    Args:
        terms: those of a whole step.
    """
    return {name: _over_layers(name, value_L) for name, value_L in terms.measured.items()}


def _rules(part: LossTerms) -> list[tuple[bool, Any]]:
    """Of each array of a micro-batch, whether it is summed, and the dimensions of the stacked ones that it is over."""
    fields = [(name in COUNTS, 0) for name in FIELDS]
    return fields + [(_row(name).reduction == "sum", (0, 1)) for name in part.measured]


def _over_parts(parts: Sequence[Sequence[np.ndarray]], first: LossTerms) -> list[np.ndarray]:
    """Reduce the arrays of a step over its micro-batches."""
    stacked = [np.stack(values).astype(np.float64) for values in zip(*parts, strict=True)]
    return [
        value.sum(axis) if is_sum else value.mean(axis)
        for value, (is_sum, axis) in zip(stacked, _rules(first), strict=True)
    ]


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
