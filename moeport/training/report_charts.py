"""The charts over the steps of a run, as the table of metrics defines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moeport.config.rules import value_at
from moeport.config.schema import Config
from moeport.pages.charts import Axis, LineChart, Series, line_chart
from moeport.training.metric import BITS_PER_BYTE, NATS, Chart
from moeport.training.metrics_table import ROWS, EvaluationMetrics, StepMetrics
from moeport.training.run_metrics import RunMetrics

MOST_MARKS = 6


def sections(
    metrics: RunMetrics, config: Config | None, baselines: Mapping[str, float], unit: str, resumed: Sequence[int]
) -> dict[str, list[LineChart]]:
    """The line charts by heading; those without a finite value, and loss terms of weight 0, are left out.

    Args:
        metrics: those of the run.
        config: that of the run, if known.
        baselines: bits per byte of compressors, by name.
        unit: unit of the losses.
        resumed: steps after which the run was resumed; the last ones are marked in the chart of the loss.
    """
    marks = {f"resumed {step:,}": float(step) for step in resumed[-MOST_MARKS:]}
    planned: dict[str, dict[str, tuple[Chart, list[Series]]]] = {}
    for chart, series in _lines(metrics):
        if config and chart.weight and value_at(config, chart.weight) == 0:
            continue
        section = planned.setdefault(chart.section, {})
        section.setdefault(chart.axis.title, (chart, []))[1].append(series)
    return {
        heading: [
            drawn
            for chart, series in sorted(charts.values(), key=lambda planned: planned[0].order)
            if (drawn := line_chart(_axis(chart.axis, baselines, unit, marks), series, metrics.last.step))
        ]
        for heading, charts in planned.items()
    }


def _lines(metrics: RunMetrics) -> list[tuple[Chart, Series]]:
    """The metrics to draw, without those that are zero throughout and marked `unless_zero`."""
    drawn = [
        (row.chart, metrics.series(kind, name, row.chart.line))
        for kind in (StepMetrics, EvaluationMetrics)
        for name, row in ROWS[kind].items()
        if row.chart
    ]
    return [(chart, line) for chart, line in drawn if not chart.unless_zero or np.any(np.nan_to_num(line.y))]


def _axis(axis: Axis, baselines: Mapping[str, float], unit: str, marks: Mapping[str, float]) -> Axis:
    """An axis with the unit, the references and the marks that depend on the run."""
    if axis.unit == NATS:
        return replace(axis, unit=unit, marks=marks)
    return replace(axis, references=baselines) if axis.unit == BITS_PER_BYTE else axis
