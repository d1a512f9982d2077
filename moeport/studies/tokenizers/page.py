"""Tokenizers side by side as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moeport.files import write_text
from moeport.pages.charts import Bar, line_chart
from moeport.pages.lines import Drawn, colours
from moeport.pages.template import load_template
from moeport.studies.tokenizers.curves import PANELS, drawn
from moeport.studies.tokenizers.evaluate import Measured
from moeport.studies.tokenizers.table import COLUMNS, explanations, tables


def write_page(path: Path, found: Sequence[Measured]) -> None:
    """Write the page. Raises WriteError."""
    page = load_template("tokenizers.html").render(
        names=[each.subject.name for each in found],
        tables=tables(found),
        explanations=explanations(found),
        bars={column.title: _bars(found, column.figure, column.show) for column in COLUMNS},
        charts=_charts(found),
        colours=colours([each.subject.name for each in found]),
    )
    write_text(path, page)


def _bars(found: Sequence[Measured], figure: str, show: Callable[[float], str]) -> list[Bar]:
    values = [each.figures[figure] for each in found]
    largest = max(values) or 1.0
    return [
        Bar(each.subject.name, show(value), 100 * value / largest, index == 0)
        for index, (each, value) in enumerate(zip(found, values, strict=True))
    ]


def _charts(found: Sequence[Measured]) -> list[Drawn]:
    charts = []
    for panel in PANELS:
        series = drawn(panel, found)
        last = max((float(one.x.max(initial=0.0)) for one in series), default=0.0)
        if last > 0 and (chart := line_chart(panel.axis, series, last)):
            charts.append(Drawn(panel.over, chart))
    return charts
