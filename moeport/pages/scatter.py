"""Points with error bars, computed as paths for a template to place on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.pages.charts import SIZE, Axis, Line, LineChart, Tick, linear_ticks, units

MARGIN = 0.08


@dataclass(frozen=True)
class Point:
    """A value with its spread in both directions."""

    label: str
    x: float
    y: float
    x_deviation: float
    """Reach of the error bar to each side; 0 for none."""
    y_deviation: float


def scatter_chart(axis: Axis, points: Sequence[Point], x_unit: str, show_x: str) -> LineChart | None:
    """Draws points with error bars; None without points.

    Args:
        axis: of y.
        points: one per line of the legend.
        x_unit: what x is.
        show_x: format of an x.
    """
    if not points:
        return None
    x_low, x_high = _range([(point.x, point.x_deviation) for point in points])
    y_low, y_high = _range([(point.y, point.y_deviation) for point in points])

    def at(x: float, y: float) -> str:
        return f"{_place(x, x_low, x_high):.1f} {SIZE - _place(y, y_low, y_high):.1f}"

    lines = []
    for point in points:
        x, y, dx, dy = point.x, point.y, point.x_deviation, point.y_deviation
        bars = (f"M{at(x - dx, y)}L{at(x + dx, y)}" if dx else "") + (f"M{at(x, y - dy)}L{at(x, y + dy)}" if dy else "")
        shown = axis.show.format(y) + (f" ± {axis.show.format(dy)}" if dy else "")
        place = f"{x_unit} {show_x.format(x)}"
        hover: dict[str, list[float | str]] = {
            "x": [round(_place(x, x_low, x_high), 1)],
            "points": [place],
            "values": [f"{shown} at {show_x.format(x)}"],
        }
        lines.append(Line(point.label, bars, "", "", f"M{at(x, y)}h0", hover))
    x_ticks = [Tick(round(_place(x, x_low, x_high) / 10, 2), text) for x, text in linear_ticks(x_low, x_high).items()]
    y_ticks = [
        Tick(round(100 - _place(y, y_low, y_high) / 10, 2), text) for y, text in linear_ticks(y_low, y_high).items()
    ]
    return LineChart(axis, lines, x_ticks, y_ticks, [], [], "")


def dots_chart(axis: Axis, x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> LineChart:
    """Draws dots that all look alike, and are named under the pointer.

    Args:
        axis: title, unit and format.
        x: where they are (dots,).
        y: likewise.
        names: of the dots.
    """
    (x_low, x_high), (y_low, y_high) = (_range([(value, 0.0) for value in values.tolist()]) for values in (x, y))
    order = np.argsort(x, kind="stable")
    left, up = units(x[order], x_low, x_high), units(y[order], y_low, y_high)
    hover = {
        "x": left.round(1).tolist(),
        "points": [names[place] for place in order],
        "values": [f"{axis.show.format(x[place])}, {axis.show.format(y[place])}" for place in order],
    }
    marks = "".join(f"M{a:.1f} {SIZE - b:.1f}h0" for a, b in zip(left, up, strict=True))
    x_ticks, y_ticks = linear_ticks(x_low, x_high), linear_ticks(y_low, y_high)
    return LineChart(
        axis,
        [Line("", "", "", "", marks, hover)],
        [Tick(round(float(units(np.array(at), x_low, x_high)) / 10, 2), text) for at, text in x_ticks.items()],
        [Tick(round(100 - float(units(np.array(at), y_low, y_high)) / 10, 2), text) for at, text in y_ticks.items()],
        [],
        [],
        "",
    )


def _range(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The ends of an axis that shows all values with their error bars, at a distance from the edges."""
    low, high = min(x - reach for x, reach in values), max(x + reach for x, reach in values)
    margin = MARGIN * (high - low) or MARGIN * abs(high) or 1.0
    return low - margin, high + margin


def _place(value: float, low: float, high: float) -> float:
    return float(units(np.array(value), low, high))
