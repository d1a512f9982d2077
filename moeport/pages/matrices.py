"""Matrices drawn as pictures, with names for rows and columns; of many layers, some are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from moeport.pages.charts import HeatMap, Tick, heat_map

T = TypeVar("T")

DRAWN = 6
"""Layers that are drawn one by one."""
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


def evenly(layers: Sequence[T]) -> list[T]:
    """At most DRAWN layers, evenly spaced, with the first and the last."""
    count = min(DRAWN, len(layers))
    return [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, count).round().astype(int))]


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
