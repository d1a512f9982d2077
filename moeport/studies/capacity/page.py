"""`moeport capacity` as one self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeport.files import write_text
from moeport.pages.charts import Axis, LineChart, Series, line_chart
from moeport.pages.template import load_template
from moeport.studies.capacity.capacity import LayerCapacity, RunCapacity
from moeport.studies.capacity.text import recommendation, rows

PAGE_FILE = "capacity.html"


@dataclass(frozen=True)
class Section:
    """One layer."""

    name: str
    summary: str
    drops: LineChart | None
    loads: LineChart | None
    bounds: list[list[str]]
    """Rows of the table: estimator, delta, then one column per form."""
    forms: list[str]


def write_page(capacity: RunCapacity, layers: list[LayerCapacity], target: float, path: Path) -> None:
    """Write the page.

    Args:
        capacity: result for the run.
        layers: the layers to show.
        target: drop rate to recommend a capacity for.
        path: the file.
    """
    page = load_template("capacity.html").render(
        name=capacity.run_dir.resolve().name,
        steps=f"Steps {capacity.first_step:,} to {capacity.last_step:,}",
        recommendation=recommendation(layers, target),
        notes=capacity.notes,
        sections=[_section(layer, target) for layer in layers],
    )
    write_text(path, page)


def _section(layer: LayerCapacity, target: float) -> Section:
    loads, wanted = layer.loads, layer.loads.capacity_for(target)
    now = "no limit now" if layer.present is None else f"capacity now {layer.present:,}"
    factor = wanted / loads.choices
    summary = (
        f"{now}, {layer.drop_rate:.2%} dropped; a drop rate of {target:.2%} takes a capacity of {wanted:,}, "
        f"factor {factor:.2f}"
    )
    capacities, drop_rates = loads.curve()
    x = np.array(capacities, float)
    curve = Series("", x, np.array(drop_rates), [f"capacity {capacity:,}" for capacity in capacities])
    marks = {"now": layer.present, f"for {target:.2%}": wanted, "mean load": loads.mean}
    axis = Axis(
        "Drop rate",
        "by capacity, in assignments",
        "{:.2%}",
        percent=True,
        from_zero=True,
        marks={label: value for label, value in marks.items() if value is not None},
    )
    drops = line_chart(axis, [curve], capacities[-1])
    return Section(
        layer.name,
        summary,
        drops,
        _load_chart(layer),
        [
            [estimator, f"{layer.measured.estimates[estimator].delta:.4f}", *map(rows, bounds.values())]
            for estimator, bounds in layer.measured.bounds.items()
        ],
        list(next(iter(layer.measured.bounds.values()), {})),
    )


def _load_chart(layer: LayerCapacity) -> LineChart | None:
    """Mean load per expert, busiest first, with a band from the minimum to the maximum over the steps."""
    rows_SE = layer.loads.rows_SE
    order = np.argsort(-rows_SE.mean(0), kind="stable")
    experts = len(order)
    busiest = Series(
        "",
        np.arange(1, experts + 1, dtype=float),
        rows_SE.mean(0)[order],
        [f"expert {expert}" for expert in order],
        rows_SE.min(0)[order],
        rows_SE.max(0)[order],
    )
    axis = Axis(
        "Load", "assignments, busiest expert first", "{:,.0f}", from_zero=True, references={"mean": layer.loads.mean}
    )
    return line_chart(axis, [busiest], experts)
