"""`moeport capacity` on a terminal."""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeport.core.bounds import FORMS
from moeport.studies.capacity.capacity import LayerCapacity, RunCapacity
from moeport.studies.capacity.measure import CONTROLLER, ESTIMATORS, LOW, RIVALS, estimator_of

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def render(capacity: RunCapacity, layers: list[LayerCapacity], target: float, all_estimators: bool) -> RenderableType:
    """Tables of loads, drop rates and bounds.

    Args:
        capacity: result for the run.
        layers: the layers to show.
        target: drop rate to recommend a capacity for.
        all_estimators: show the bounds at every delta, not only at the config's and at the low quantile.
    """
    parts: list[RenderableType] = [_loads(capacity, layers, target), _drops(layers)]
    if any(layer.measured.bounds for layer in layers):
        chosen = ESTIMATORS if all_estimators else (estimator_of(capacity.config.model.moe.capacity), LOW)
        parts += [_bounds(capacity, layers, chosen)]
    parts += [Text(note, style="dim") for note in capacity.notes]
    parts.append(Text(recommendation(layers, target), style="bold"))
    return Group(*parts)


def recommendation(layers: list[LayerCapacity], target: float) -> str:
    """What to write into the config so that each of these layers stays within a drop rate.

    Args:
        layers: the layers that have a say.
        target: the drop rate, as a fraction.
    """
    needed = {layer.name: layer.loads.capacity_for(target) / layer.loads.choices for layer in layers}
    name = max(needed, key=needed.__getitem__)
    factor = math.ceil(needed[name] * 100 - 1e-9) / 100
    worst = max(layer.loads.drop_rate(math.ceil(factor * layer.loads.choices)) for layer in layers)
    return (
        f"Recommended: set model.moe.capacity: {{policy: factor, factor: {factor:.2f}}}. On these steps it would have "
        f"dropped at most {worst:.2%} in a layer; {name} needs the most"
    )


def rows(value: float) -> str:
    """A number of assignments as text; a dash for NaN."""
    if math.isnan(value):
        return "-"
    if not math.isfinite(value) or value >= 1e7:
        return "> 1e7"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("layer")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _loads(capacity: RunCapacity, layers: list[LayerCapacity], target: float) -> Table:
    unit = "micro-batch" if capacity.micro_batches > 1 else "step"
    steps = f"steps {capacity.first_step:,} to {capacity.last_step:,}"
    table = _table(
        f"Assignments per expert and {unit}, {steps}",
        "mean",
        "least",
        "median",
        "most",
        "capacity now",
        "dropped now",
        f"capacity for {target:.2%}",
        "as a factor",
    )
    for layer in layers:
        loads, wanted = layer.loads, layer.loads.capacity_for(target)
        table.add_row(
            layer.name,
            rows(loads.mean),
            *(rows(float(np.quantile(loads.rows_SE, share))) for share in (0, 0.5, 1)),
            "none" if layer.present is None else f"{layer.present:,}",
            f"{layer.drop_rate:.2%}",
            f"{wanted:,}",
            f"{wanted / loads.choices:.2f}",
        )
    return table


def _drops(layers: list[LayerCapacity]) -> Table:
    table = _table("Drop rate by capacity factor", *(f"{factor:.2f}" for factor in FACTORS))
    for layer in layers:
        capacities = [math.ceil(factor * layer.loads.choices) for factor in FACTORS]
        table.add_row(layer.name, *(f"{layer.loads.drop_rate(capacity):.2%}" for capacity in capacities))
    return table


def _bounds(capacity: RunCapacity, layers: list[LayerCapacity], chosen: Container[str]) -> Table:
    success = f"success {1 - capacity.config.model.moe.capacity.failure:.0%}"
    columns = {
        f"{FORMS[0]}, paper": "I, paper",
        f"{FORMS[0]}, independent": "I, indep.",
        f"{FORMS[1]}, paper": "erfc, paper",
        f"{FORMS[1]}, independent": "erfc, indep.",
        FORMS[2]: "exponential",
        success: success,
        RIVALS: RIVALS,
        CONTROLLER: CONTROLLER,
    }
    table = _table(
        "Bounds at the cosine measured on the last checkpoint, not clipped", "delta", "value", *columns.values()
    )
    for layer in layers:
        for estimator, bounds in layer.measured.bounds.items():
            if estimator in chosen:
                delta = layer.measured.estimates[estimator].delta
                table.add_row(layer.name, estimator, f"{delta:.4f}", *(rows(bounds[column]) for column in columns))
    return table
