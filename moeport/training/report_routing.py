"""What a report shows of the vocabulary ids: which experts they go to, and since when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moeport.errors import DataError
from moeport.pages.charts import Axis, Series, line_chart
from moeport.pages.lines import Colour, Drawn, colours
from moeport.pages.matrices import Map, evenly, matrix_map
from moeport.training.routing_log import Record, RoutingFile, read_routing
from moeport.training.routing_spread import overlap, spread

LEAST = 32
"""Assignments that an id must have in a stretch of steps to be looked at. Ours."""


@dataclass(frozen=True)
class RoutingFigures:
    """Figures of a routing.json; empty if it has no counts."""

    about: str = ""
    """What was counted."""
    listed: Sequence[Drawn] = ()
    """Over the steps, a line for each layer."""
    maps: Sequence[Map] = ()
    """Of the last stretch, by layer."""
    colours: Mapping[str, Colour] = field(default_factory=dict)
    """Of the lines, by layer."""


def routing(path: Path, layers: Sequence[str], last_step: int) -> RoutingFigures:
    """The figures of a routing.json; none if it is missing, damaged, empty or that of another model.

    Args:
        path: the file.
        layers: names of the layers with experts.
        last_step: of the run so far.
    """
    try:
        file = read_routing(path)
    except DataError:
        return RoutingFigures()
    if file is None or not (stretches := [each for each in file.stretches if each.steps and each.count_LXE.any()]):
        return RoutingFigures()
    last = stretches[-1]
    if len(last.count_LXE) != len(layers):
        return RoutingFigures()
    shown = [(number, layers[number]) for number in evenly(range(len(layers)))]
    chance = float(np.mean([spread(last.count_LXE[number], LEAST).chance for number, _ in shown]))
    deviation = Axis(
        "Deviation by token id",
        "mean over the ids",
        "{:.3f}",
        from_zero=True,
        references={"chance": chance} if np.isfinite(chance) else {},
    )
    charts = [_over_steps(deviation, shown, stretches, last_step, lambda count_XE, _: spread(count_XE, LEAST).mean)]
    if len(stretches) > 1:
        axis = Axis("Overlap with the end", "1 is the same routing", "{:.2f}", from_zero=True)
        charts.append(
            _over_steps(axis, shown, stretches[:-1], last_step, lambda a_XE, b_XE: overlap(b_XE, a_XE, LEAST), last)
        )
    return RoutingFigures(
        f"The {len(file.ids)} most frequent token ids of the text, in {sum(each.steps for each in stretches):,} steps.",
        [chart for chart in charts if chart is not None],
        [_map(name, file, last.count_LXE[number]) for number, name in shown],
        colours([name for _, name in shown]),
    )


def _over_steps(
    axis: Axis,
    layers: Sequence[tuple[int, str]],
    stretches: Sequence[Record],
    last_step: int,
    value: Callable[[np.ndarray, np.ndarray], float],
    other: Record | None = None,
) -> Drawn | None:
    """A value of the counts (X, E) of each stretch, and of those of another one."""
    x = np.array([each.last for each in stretches], float)
    points = [f"steps {each.first:,} to {each.last:,}" for each in stretches]
    series = [
        Series(name, x, np.array([value(a.count_LXE[layer], (other or a).count_LXE[layer]) for a in stretches]), points)
        for layer, name in layers
    ]
    chart = line_chart(axis, series, last_step)
    return Drawn("steps", chart) if chart else None


def _map(layer: str, file: RoutingFile, count_XE: np.ndarray) -> Map:
    """The share of each expert in the assignments of each id, as a multiple of an even share."""
    share_EX = (count_XE / np.maximum(1, count_XE.sum(1, keepdims=True))).T
    experts = [str(expert) for expert in range(len(share_EX))]
    return matrix_map(layer, ("expert", experts), ("token id", file.names), share_EX * len(experts), share_EX, "{:.0%}")
