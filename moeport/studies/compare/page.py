"""A comparison as one self-contained HTML page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moeport.files import write_text
from moeport.pages.charts import Axis, Bar, Series, line_chart
from moeport.pages.lines import Drawn, colours
from moeport.pages.scatter import Point, scatter_chart
from moeport.pages.template import load_template
from moeport.studies.compare.figures import Figures, mean_curve
from moeport.studies.compare.outcome import Comparison
from moeport.studies.compare.plot import PANELS, final_losses
from moeport.studies.compare.spread import spread
from moeport.studies.compare.table import columns, explanations, rows
from moeport.training.run_dir import REPORT_FILE

PAGE_FILE = "compare.html"

LOSS = Axis("Validation loss", "nats", "{:.4f}")
OVER = {
    "val_loss": "steps",
    "loss_over_rows": "rows computed by the experts",
    "loss_over_flops": "floating-point operations",
    "loss_over_time": "seconds of training",
}
"""What the curves in LOSSES are drawn over."""
AXES = {
    "drop_rate": Axis("Drop rate", "of assignments", "{:.2%}", percent=True, from_zero=True),
    "imbalance": Axis("Expert imbalance", "largest / mean load", "{:.2f}", references={"balanced": 1.0}),
    "local_share": Axis("Choices on the own node", "of choices", "{:.1%}", percent=True),
    "rows_max": Axis("Rows of the busiest expert", "per step, mean over the layers", "{:,.0f}", from_zero=True),
    "rows_mean": Axis("Rows per expert", "per step, mean over experts and layers", "{:,.0f}", from_zero=True),
}


class RunLink(NamedTuple):
    """A run's own report."""

    label: str
    address: str


def write_page(comparison: Comparison, folder: Path) -> Path:
    """Write FOLDER/compare.html.

    Args:
        comparison: the comparison to show.
        folder: the folder; links to the reports of the runs are relative to it.

    Returns: the page.
    """
    plan = comparison.plan
    page = load_template("compare.html").render(
        baseline=plan.baseline,
        titles=[column.title for column in columns(comparison)],
        rows=rows(comparison),
        links={name: _links(comparison, name, folder) for name in plan.names},
        explanations=explanations(comparison),
        interruption=comparison.interruption,
        losses=[*_final(comparison), *_losses(comparison)],
        charts=_charts(comparison),
        colours=colours(plan.names),
        bars={
            "Step time, s": _bars(comparison, lambda figures: figures.step_time, "{:.3f}"),
            "All-to-all, bytes per token (computed)": _bars(comparison, lambda f: f.all_to_all_bytes, "{:,.0f}"),
        },
        differences={name: plan.differences(name) for name in plan.names},
    )
    path = folder / PAGE_FILE
    write_text(path, page)
    return path


def _links(comparison: Comparison, name: str, folder: Path) -> list[RunLink]:
    reports = {outcome.run.seed: outcome.run.dir / REPORT_FILE for outcome in comparison.of(name) if outcome.result}
    return [
        RunLink(f"seed {seed}", Path(os.path.relpath(path, folder)).as_posix())
        for seed, path in reports.items()
        if path.is_file()
    ]


def _final(comparison: Comparison) -> Iterator[Drawn]:
    """The loss at the end over the cost, with standard deviations as error bars."""
    for (figure, over), show in zip(PANELS.items(), ("{:.3f}", "{:,.0f}", "{:,.1f}"), strict=True):
        points = [
            Point(name, x.mean, y.mean, x.deviation or 0.0, y.deviation or 0.0)
            for name, x, y in final_losses(comparison, figure)
        ]
        axis = replace(LOSS, title="Validation loss at the end, mean ± standard deviation")
        if chart := scatter_chart(axis, points, over.partition(",")[0], show):
            yield Drawn(over, chart)


def _losses(comparison: Comparison) -> Iterator[Drawn]:
    """The validation loss over steps, rows, FLOPs and time; bands reach from the least to the greatest of the seeds."""
    for curve, over in OVER.items():
        series = _series(comparison, curve)
        last = max((float(one.x.max(initial=0.0)) for one in series), default=0.0)
        if last > 0 and (chart := line_chart(LOSS, series, last, whole=curve != "loss_over_time")):
            yield Drawn(over, chart)


def _charts(comparison: Comparison) -> list[Drawn]:
    """The line charts over the steps, without those of what never happened."""
    charts = []
    steps = max(run.config.training.steps for run in comparison.plan.runs)
    for curve, axis in AXES.items():
        series = _series(comparison, curve)
        if curve == "drop_rate" and not any(np.any(one.y) for one in series):
            continue
        if chart := line_chart(axis, series, steps):
            charts.append(Drawn("steps", chart))
    return charts


def _series(comparison: Comparison, curve: str) -> list[Series]:
    """A line per config that has finished runs."""
    series = []
    for name in comparison.plan.names:
        results = [outcome.result for outcome in comparison.of(name) if outcome.result]
        if results and comparison.figures(name):
            series.append(mean_curve([result.curves[curve] for result in results], name))
    return series


def _bars(comparison: Comparison, value: Callable[[Figures], float], form: str) -> list[Bar]:
    means = {
        name: spread([value(figures) for figures in by_seed.values()]).mean
        for name in comparison.plan.names
        if (by_seed := comparison.figures(name))
    }
    largest = max(means.values(), default=0.0) or 1.0
    return [
        Bar(name, form.format(mean), 100 * mean / largest, name == comparison.plan.baseline)
        for name, mean in means.items()
    ]
