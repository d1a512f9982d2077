"""What the page consists of: sections, each with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeport.pages.charts import Axis, LineChart, Series, line_chart
from moeport.pages.lines import Drawn
from moeport.pages.matrices import Map, evenly
from moeport.pages.tables import Table
from moeport.studies.inspect.inspect import Found, LayerFound
from moeport.studies.inspect.readings import READINGS, Reading


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
    """The layers that are drawn one by one; the others are in the JSON and in the figures over depth."""
    return evenly(found.layers)


def over_layers(axis: Axis, found: Found, values: Mapping[str, Sequence[float]]) -> list[Drawn]:
    """A chart of one or more values by layer; none with a single layer."""
    layers = len(found.layers)
    if layers < 2:
        return []
    names, x = [layer.name for layer in found.layers], np.arange(layers, dtype=float)
    series = [Series(label, x, np.array(y, float), names) for label, y in values.items()]
    chart = line_chart(axis, series, layers - 1)
    return [Drawn("layers with experts", chart)] if chart else []
