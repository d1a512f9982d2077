"""The charts of a parity page: errors by depth and by step, agreement of decisions, histograms."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from moeport.pages.charts import SIZE, Axis, HeatMap, LineChart, Series, Tick, heat_map, line_chart
from moeport.parity import text
from moeport.parity.result import Comparison, RoutingResult, TensorResult

COLUMNS = 128
"""Maximum number of columns of a heat map."""
CLASSES = {
    "parameter": "Parameters",
    "input": "Inputs",
    "activation": "Activations",
    "score": "Router scores",
    "loss": "Losses",
    "gradient": "Gradients",
    "training gradient": "Gradients of the optimiser step",
    "moment": "Optimiser moments",
    "update": "Optimiser updates",
    "state": "Router state and buffers",
    "second step": "Second optimiser step",
}
"""Headings of the kinds of float tensors, in the order of execution."""
COLOURS = {
    "A against golden": "green",
    "B against golden": "purple",
    "B against A, own routing": "orange",
    "B against A": "blue",
    "limit": "dim",
    "first beyond tolerance": "red",
    "A": "blue",
    "B": "orange",
}
"""Colours of lines, by label; see parity.css."""


@dataclass(frozen=True)
class Chart:
    """A line chart with a colour for each line."""

    lines: LineChart
    colours: Sequence[str]
    over: str
    """Describes the horizontal axis."""


@dataclass(frozen=True)
class Agreement:
    """A heat map of decisions by tokens: how much of each block of rows was decided differently."""

    title: str
    names: Sequence[str]
    """Decisions, from top to bottom."""
    rows: int
    """Total number of rows of all decisions."""
    columns: Sequence[str]
    """Labels of the blocks of rows, from left to right."""
    flips: Sequence[Sequence[int]]
    """Number of rows decided differently, for each decision and block."""
    map: HeatMap


@dataclass(frozen=True)
class Bars:
    """A histogram as SVG paths whose heights are the logarithms of the counts."""

    low: str
    high: str
    paths: Sequence[str]


def depth_chart(found: Comparison, kind: str) -> Chart | None:
    """Errors of a kind in the order of execution; None if all are bit-identical."""
    group = [tensor for tensor in found.tensors if tensor.kind == kind]
    values: dict[str, list[float]] = {
        "A against golden": [t.golden.error_a if t.golden else 0.0 for t in group],
        "B against golden": [t.golden.error_b if t.golden else 0.0 for t in group],
        "B against A, own routing": [t.error if t.free_error is None else t.free_error for t in group],
        "B against A": [t.error for t in group],
    }
    if values["B against A, own routing"] == values["B against A"]:
        del values["B against A, own routing"]
    finite = [v for part in values.values() for v in part if 0 < v < np.inf]
    if not any(t.error for t in group):
        return None
    limits = [t.limit for t in group]
    constant = len({f"{limit:.1e}" for limit in limits}) == 1
    if not constant:
        values["limit"] = limits
    first = next((t for t in group if found.culprit and t.verdict == "fail" and found.culprit.kind == kind), None)
    values["first beyond tolerance"] = [t.error if t is first else 0.0 for t in group]
    high = max([*finite, *limits]) * 3  # for infinite errors
    points = [t.name for t in group]
    x = np.arange(len(group))
    axis = Axis(CLASSES[kind], "relative error", logarithmic=True)
    if constant:
        axis = replace(axis, references={f"limit {limits[0]:.0e}": limits[0]})
    drawn = {label: np.where(np.array(part) > 0, np.minimum(part, high), np.nan) for label, part in values.items()}
    series = [Series(label, x, part, points) for label, part in drawn.items()]
    chart = line_chart(axis, series, max(len(group) - 1, 1))
    assert chart
    chart = replace(chart, x_ticks=_layer_ticks(group))
    return _coloured(chart, "the order of execution", lambda label: [text.number(v) for v in values[label] if v > 0])


def _layer_ticks(group: Sequence[TensorResult]) -> list[Tick]:
    """Where each block begins; with many blocks, only some. After `layer N`, a number says enough."""
    starts = [i for i, t in enumerate(group) if t.layer is not None and (i == 0 or group[i - 1].layer != t.layer)]
    wide = 100 / max(len(group) - 1, 1)
    ticks: list[Tick] = []
    for i in starts:
        if not ticks:
            ticks.append(Tick(round(i * wide, 2), f"layer {group[i].layer}"))
        elif i * wide - ticks[-1].percent >= (14 if len(ticks) == 1 else 9):
            ticks.append(Tick(round(i * wide, 2), str(group[i].layer)))
    return ticks


def step_charts(found: Comparison) -> list[Chart]:
    """Losses, gradient norms and loads of both sides over the steps; empty without a trajectory."""
    steps = found.trajectory
    if not steps:
        return []
    x = np.array([step.step for step in steps])
    points = [f"step {step.step}" for step in steps]
    limit = {f"limit {steps[0].limit:.0e}": steps[0].limit}

    def relative(a: float, b: float) -> float:
        return abs(b - a) / abs(a) if a else abs(b)

    plans: list[tuple[Axis, dict[str, list[float]]]] = [
        (Axis("Loss", "nats/token", "{:.6f}"), {"A": [s.loss_a for s in steps], "B": [s.loss_b for s in steps]}),
        (
            Axis("Difference of the loss", "relative", "{:.1e}", logarithmic=True, references=limit),
            {"B against A": [s.difference for s in steps]},
        ),
        (
            Axis("Difference of the gradient norm", "relative", "{:.1e}", logarithmic=True),
            {"B against A": [relative(s.grad_norm_a, s.grad_norm_b) for s in steps]},
        ),
        (
            Axis("Largest difference of an expert's load", "share of the assignments", "{:.2%}", percent=True),
            {"B against A": [s.load_difference for s in steps]},
        ),
    ]
    charts = []
    for axis, values in plans:
        series = []
        for label, part in values.items():
            y = np.array(part, float)
            series.append(Series(label, x, np.where(y == 0, np.nan, y), points))
        if chart := line_chart(axis, series, int(x[-1])):
            charts.append(_coloured(chart, "steps"))
    return charts


def _coloured(chart: LineChart, over: str, texts: Callable[[str], Sequence[str]] | None = None) -> Chart:
    """A chart with marked points and colours by label.

    Args:
        chart: the chart.
        over: describes the horizontal axis.
        texts: the values of a line as text, by label, where they are not the drawn ones.
    """
    lines = []
    for line in chart.lines:
        hover = {**line.hover, "values": texts(line.label)} if texts else line.hover
        lines.append(replace(line, hover=hover, marks=re.sub("[ML]([^ML]+)", r"M\1h0", line.path)))
    return Chart(replace(chart, lines=lines, last=""), [COLOURS[line.label] for line in lines], over)


def agreements(routing: Sequence[RoutingResult]) -> list[Agreement]:
    """Heat maps without and with A's routing, one for all decisions with the same number of rows."""
    maps = []
    for rows in dict.fromkeys(found.rows for found in routing):
        group = [found for found in routing if found.rows == rows and found.rows > 1]
        if not group:
            continue
        title = f"{rows:,} rows" if len({found.rows for found in routing}) > 1 else ""
        maps.append(_agreement(" ".join(["Own routing", title]).strip(), group, [f.flipped_rows for f in group]))
        replayed = [f.flipped_rows_replayed for f in group if f.flipped_rows_replayed is not None]
        if len(replayed) == len(group):
            maps.append(_agreement(" ".join(["With A's routing up to there", title]).strip(), group, replayed))
    return maps


def _agreement(title: str, group: Sequence[RoutingResult], flipped: Sequence[Sequence[int]]) -> Agreement:
    rows = group[0].rows
    columns = min(rows, COLUMNS)
    edges = np.linspace(0, rows, columns + 1).round().astype(int)
    flips_DC = np.array([np.histogram(row, edges)[0] for row in flipped])
    drawn = heat_map(1 + flips_DC / np.diff(edges), rows)
    shown = range(0, len(group), max(1, -(-len(group) // 24)))
    y_ticks = [Tick(round((i + 0.5) * 100 / len(group), 2), _short(group[i], group)) for i in shown]
    texts = [f"row {a}" if b - a == 1 else f"rows {a} to {b - 1}" for a, b in pairwise(edges)]
    return Agreement(
        title, [f.name for f in group], rows * len(group), texts, flips_DC.tolist(), replace(drawn, y_ticks=y_ticks)
    )


def _short(found: RoutingResult, group: Sequence[RoutingResult]) -> str:
    """`layer 3`, with the operation if a layer decides more than once."""
    layer = f"layer {found.layer}" if found.layer is not None else found.name
    only_one = sum(other.layer == found.layer for other in group) == 1
    return layer if only_one else f"{layer} {found.op or ''}".strip()


def bars(low: str, high: str, *counts: Sequence[int]) -> Bars:
    """Outlines of histograms with common bins, SIZE by SIZE units; `low` and `high` label the ends."""
    heights = [np.log1p(np.array(part, float)) for part in counts]
    top = max(float(part.max()) for part in heights) or 1.0
    paths = []
    for part in heights:
        width = SIZE / len(part)
        steps = "".join(f"V{SIZE - SIZE * h / top:.0f}H{(i + 1) * width:.0f}" for i, h in enumerate(part))
        paths.append(f"M0 {SIZE}{steps}V{SIZE}")
    return Bars(low, high, paths)
