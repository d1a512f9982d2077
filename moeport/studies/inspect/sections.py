"""What the page consists of: sections, each with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moeport.pages.charts import Axis, HeatMap, LineChart, Series, Tick, heat_map, line_chart
from moeport.pages.lines import Drawn
from moeport.pages.tables import Table
from moeport.studies.inspect.inspect import Found, LayerFound
from moeport.studies.inspect.readings import READINGS, Reading

SHOWN_LAYERS = 6
"""Layers that are drawn one by one; the others are in the JSON and in the figures over depth."""
LABELLED = 8
"""Most labels on an axis of a map."""


@dataclass(frozen=True)
class Map:
    """A matrix, drawn as a picture."""

    title: str
    rows: str
    columns: str
    """What rows and columns are."""
    row_names: Sequence[str]
    column_names: Sequence[str]
    values: Sequence[Sequence[str]]
    picture: HeatMap


@dataclass(frozen=True)
class Section:
    """One question, with the figures that answer it."""

    key: str
    """Its row in READINGS."""
    charts: Sequence[LineChart] = ()
    listed: Sequence[Drawn] = ()
    """Charts with a line for each of several things, which a list names."""
    maps: Sequence[Map] = ()
    tables: Sequence[Table] = ()

    @property
    def reading(self) -> Reading:
        """How it is read."""
        return READINGS[self.key]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.charts or self.listed or self.maps or self.tables)


def shown_layers(found: Found) -> list[LayerFound]:
    """At most SHOWN_LAYERS layers, evenly spaced, with the first and the last."""
    count = min(SHOWN_LAYERS, len(found.layers))
    index = np.unique(np.linspace(0, len(found.layers) - 1, count).round().astype(int))
    return [found.layers[i] for i in index]


def over_layers(axis: Axis, found: Found, values: Mapping[str, Sequence[float]]) -> list[Drawn]:
    """A chart of one or more values by layer; none with a single layer."""
    layers = len(found.layers)
    if layers < 2:
        return []
    names, x = [layer.name for layer in found.layers], np.arange(layers, dtype=float)
    series = [Series(label, x, np.array(y, float), names) for label, y in values.items()]
    chart = line_chart(axis, series, layers - 1)
    return [Drawn("layers with experts", chart)] if chart else []


def matrix_map(
    title: str,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    ratio: np.ndarray,
    values: np.ndarray,
    show: str = "{:.2f}",
) -> Map:
    """A map of ratios, of which 1 is transparent, 0 blue, and 2 or more orange.

    Args:
        title: above it.
        rows: what they are, and their names.
        columns: likewise.
        ratio: what is drawn.
        values: what is shown under the pointer.
        show: its format.
    """
    texts = [[show.format(value) for value in row] for row in values.tolist()]
    picture = replace(heat_map(ratio, 1), x_ticks=ticks(columns[1]), y_ticks=ticks(rows[1]))
    return Map(title, rows[0], columns[0], rows[1], columns[1], texts, picture)


def ticks(names: Sequence[str]) -> list[Tick]:
    """Some of the names, each at the middle of its row or column."""
    step = -(-len(names) // LABELLED)
    return [Tick(round((i + 0.5) * 100 / len(names), 2), names[i]) for i in range(0, len(names), step)]
