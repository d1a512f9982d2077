"""Charts with a line for each of many things that are compared, whose names stand in a list beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeport.pages.charts import LineChart

HUES = (217, 21, 142, 271, 43, 330, 185, 0, 90, 300)
DASHES = ("none", "7 3", "2 3")
"""Colours and dashes together distinguish 30 lines."""


class Drawn(NamedTuple):
    """A chart and what it is drawn over."""

    over: str
    chart: LineChart


class Colour(NamedTuple):
    """How a line is drawn in all charts of a page."""

    hue: int
    dash: str


def colours(names: Sequence[str]) -> dict[str, Colour]:
    """A colour for each name, in order."""
    return {
        name: Colour(HUES[index % len(HUES)], DASHES[index // len(HUES) % len(DASHES)])
        for index, name in enumerate(names)
    }
