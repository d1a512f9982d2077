"""Long-context figures of several models as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeport.files import write_text
from moeport.pages.charts import Axis, Series, line_chart
from moeport.pages.lines import Drawn, colours
from moeport.pages.template import load_template
from moeport.studies.long_context.measure import LongContext
from moeport.studies.long_context.needles import FORMS, Options
from moeport.studies.long_context.table import explanations, tables
from moeport.studies.long_context.text import Text

CHARTS = {"exact": "Exact answers", "choice": "Right choices"}
"""Shares that are drawn over the length, and at each depth."""


@dataclass(frozen=True)
class Grid:
    """Shares of one model and form: a row for each depth, a column for each length."""

    title: str
    lengths: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]
    """Depth, and shares between 0 and 1."""


def write_page(path: Path, found: Sequence[LongContext], options: Options, text: Text) -> None:
    """Write the page. Raises WriteError."""
    page = load_template("long_context.html").render(
        names=[each.name for each in found],
        origin=text.origin,
        tables=tables(found, options),
        explanations=explanations(found, options),
        summaries={form: FORMS[form].summary for form in options.forms},
        forms={form: _form_charts(found, form, options) for form in options.forms} if found[0].cells else {},
        grids=_grids(found, options) if found[0].cells else {},
        positions=_position_chart(found),
        colours=colours([each.name for each in found]),
    )
    write_text(path, page)


def _form_charts(found: Sequence[LongContext], form: str, options: Options) -> list[Drawn]:
    """Shares over the length, with the intervals of the questions as bands."""
    charts = []
    for share, title in CHARTS.items():
        references = {"chance": options.chance} if share == "choice" else {}
        axis = Axis(title, form, "{:.1%}", percent=True, from_zero=True, references=references, marks=_trained(found))
        series = []
        for each in found:
            cells = [each.total(form, length) for length in options.lengths]
            low, high = np.array([cell.interval(share) for cell in cells]).T
            points = [f"{length:,} tokens" for length in options.lengths]
            y = np.array([getattr(cell, share) for cell in cells])
            series.append(Series(each.name, np.array(options.lengths, float), y, points, low, high))
        if chart := line_chart(axis, series, max(options.lengths)):
            charts.append(Drawn("tokens of the prompt", chart))
    return charts


def _trained(found: Sequence[LongContext]) -> dict[str, float]:
    """The lengths of training, as marks."""
    return {f"trained on {length:,}": length for length in sorted({each.trained_length for each in found})}


def _grids(found: Sequence[LongContext], options: Options) -> dict[str, list[Grid]]:
    """By share, the grids of all models and forms with depths."""
    lengths = [f"{length:,}" for length in options.lengths]
    grids = {}
    for share, title in CHARTS.items():
        grids[title] = [
            Grid(
                f"{each.name}, {form}",
                lengths,
                [
                    (f"{100 * depth:.6g}%", [_at(each, form, length, depth, share) for length in options.lengths])
                    for depth in options.depths
                ],
            )
            for form in options.forms
            if FORMS[form].has_depth
            for each in found
        ]
    return grids


def _at(found: LongContext, form: str, length: int, depth: float, share: str) -> float:
    cell = next(each for each in found.cells if (each.form, each.length, each.depth) == (form, length, depth))
    return float(getattr(cell, share))


def _position_chart(found: Sequence[LongContext]) -> Drawn | None:
    """The loss in the middle of each block, with the intervals over sequences as bands."""
    series, last = [], 0
    for each in found:
        if each.positions:
            losses, blocks = each.positions.losses, each.positions.blocks
            middles = np.array([(first + end) / 2 for first, end in blocks])
            low, high = (
                np.array([getattr(one, side) if one.low is not None else one.mean for one in losses])
                for side in ("low", "high")
            )
            points = [f"positions {first:,} to {end:,}" for first, end in blocks]
            series.append(Series(each.name, middles, np.array([one.mean for one in losses]), points, low, high))
            last = max(last, each.positions.length)
    chart = (
        line_chart(Axis("Loss", "nats per token", "{:.4f}", marks=_trained(found)), series, last) if series else None
    )
    return Drawn("position", chart) if chart else None
