"""What the page shows of the runs: parts of HTML, each sent only when it has changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeport.pages.charts import Series, line_chart
from moeport.pages.lines import Drawn, colours
from moeport.pages.template import load_template
from moeport.studies.watch.followed import Followed
from moeport.training.duration import duration
from moeport.training.metric import NATS
from moeport.training.metrics_table import ROWS, EvaluationMetrics, StepMetrics
from moeport.training.report import describe_model
from moeport.training.report_charts import sections
from moeport.training.report_figures import KeyFigure
from moeport.training.report_layers import drops, expert_loads, layer_names

REFRESH_SECONDS = 1.0
"""Least time between two looks at the disk, however many pages ask."""
HEAT_SECONDS = 10.0
"""Least time between two drawings of the heat maps, the largest parts."""


@dataclass(frozen=True)
class Card:
    """What stands at the top about a run."""

    name: str
    state: str
    note: str
    model: str
    percent: float
    steps: str
    figures: Sequence[KeyFigure]
    faults: Sequence[str]


@dataclass(frozen=True)
class Part:
    """A part of the page."""

    group: str
    """Heading that it stands under; empty: none."""
    html: str
    version: int
    """When it last changed."""


class Page:
    """The page of some runs; many readers may ask at once.

    Args:
        runs: the runs.
    """

    def __init__(self, runs: Sequence[Followed]):
        self.runs = runs
        self._macros: Any = load_template("watch_parts.html").module
        self._colours = colours([run.name for run in runs])
        self._parts: dict[str, Part] = {}
        self._version = 0
        self._looked = self._drawn = -HEAT_SECONDS
        self._owes = True
        """Whether something has changed since the heat maps were drawn."""
        self._lock = threading.Lock()

    def html(self) -> str:
        """The page itself, without its parts."""
        return load_template("watch.html").render(names=[run.name for run in self.runs])

    def changes(self, have: int) -> dict[str, Any]:
        """What has changed since a version: the parts in order with their headings, and the HTML of those that are new.

        Args:
            have: the version that the reader has; 0: none.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= REFRESH_SECONDS:
                self._refresh()
                self._looked = now
            return {
                "version": self._version,
                "behind": any(run.is_behind for run in self.runs),
                "order": [[key, part.group] for key, part in self._parts.items()],
                "parts": {key: part.html for key, part in self._parts.items() if part.version > have},
            }

    def _refresh(self) -> None:
        changed = [run.refresh() for run in self.runs]
        made = dict(self._made(any(changed) or not self._parts))
        self._version += 1
        version = self._version
        self._parts = {
            key: old
            if (old := self._parts.get(key)) and (old.group, old.html) == made_part
            else Part(*made_part, version)
            for key, made_part in made.items()
        }

    def _made(self, changed: bool) -> Iterator[tuple[str, tuple[str, str]]]:
        """Key, heading and HTML of each part, in order; those that cannot have changed as they were."""
        yield "runs", ("", self._macros.cards([card(run) for run in self.runs]))
        running = [run for run in self.runs if run.metrics.num_steps]
        yield from self._charts(running) if changed else self._as_before("chart ")
        now, self._owes = time.monotonic(), self._owes or changed
        if not self._owes or now - self._drawn < HEAT_SECONDS:
            yield from self._as_before("layers ")
            return
        self._drawn, self._owes = now, False
        for number, run in enumerate(running):
            yield from self._layers(number, run)

    def _as_before(self, start: str) -> list[tuple[str, tuple[str, str]]]:
        return [(key, (part.group, part.html)) for key, part in self._parts.items() if key.startswith(start)]

    def _charts(self, runs: Sequence[Followed]) -> Iterator[tuple[str, tuple[str, str]]]:
        if len(self.runs) == 1:
            for run in runs:
                for heading, charts in sections(run.metrics, run.config, {}, unit_of(run), run.resumed).items():
                    for chart in charts:
                        yield f"chart {heading} {chart.axis.title}", (heading, self._macros.one(chart))
            return
        for heading, drawn in compared(runs):
            yield f"chart {heading} {drawn.chart.axis.title}", (heading, self._macros.several(drawn, self._colours))

    def _layers(self, number: int, run: Followed) -> Iterator[tuple[str, tuple[str, str]]]:
        of_run = f" of {run.name}" if len(self.runs) > 1 else ""
        layers = layer_names(run.config, len(run.metrics.dropped_L))
        if loads := expert_loads(run.metrics, layers):
            html = self._macros.loads(loads, run.metrics.num_experts)
            yield f"layers {number} loads", (f"Expert load by layer{of_run}", html)
        if dropped := drops(run.metrics, layers):
            yield f"layers {number} drops", (f"Dropped assignments by layer{of_run}", self._macros.bars(dropped))


def unit_of(run: Followed) -> str:
    """Unit of the losses of a run."""
    return "nats/image" if run.config and run.config.data.is_images else NATS


def compared(runs: Sequence[Followed]) -> Iterator[tuple[str, Drawn]]:
    """A chart for each metric, with a line for each run."""
    last = max((run.steps for run in runs), default=0)
    for kind in (StepMetrics, EvaluationMetrics):
        for name, row in ROWS[kind].items():
            if row.chart is None:
                continue
            lines = [run.metrics.series(kind, name, run.name) for run in runs]
            if row.chart.unless_zero and not any(np.nan_to_num(line.y).any() for line in lines):
                continue
            title = f"{row.chart.axis.title}, {row.chart.line}" if row.chart.line else row.chart.axis.title
            drawn = line_chart(replace(row.chart.axis, title=title), [_plain(line) for line in lines], last)
            if drawn:
                yield row.chart.section, Drawn("steps", drawn)


def _plain(line: Series) -> Series:
    """A line without its band, since the bands of several runs would cover each other."""
    return replace(line, low=None, high=None)


def card(run: Followed) -> Card:
    """What stands at the top about a run."""
    state, note = run.state()
    total, metrics = run.total, run.metrics
    steps = f"step {run.steps:,}{f' of {total:,}' if total else ''}" if run.steps else "no step yet"
    faults = [f"Its metrics cannot be read: {run.fault}"] if run.fault else []
    if run.unreadable:
        faults.append(f"{run.unreadable:,} lines of its metrics are not records and are left out")
    return Card(
        run.name,
        state,
        note,
        describe_model(run.config) if run.config else "",
        100.0 * run.steps / total if total else 0.0,
        steps,
        list(_figures(run)) if metrics.num_steps else [],
        faults,
    )


def _figures(run: Followed) -> Iterator[KeyFigure]:
    metrics, last = run.metrics, run.metrics.last
    yield KeyFigure("Loss", f"{last.loss:.4f}", unit_of(run))
    if evaluation := metrics.last_evaluation:
        yield KeyFigure("Validation loss", f"{evaluation.val_loss:.4f}", f"after step {evaluation.step:,}")
    yield KeyFigure("Throughput", f"{last.tokens_per_second:,.0f}", "tokens/s")
    if run.state()[0] in ("training", "starting"):
        if run.seconds_left is not None:
            yield KeyFigure("Time left", duration(run.seconds_left), "at the pace of the last steps")
        if run.seconds_since is not None:
            yield KeyFigure("Last step", duration(run.seconds_since), "ago")
    yield KeyFigure("Imbalance", f"{last.imbalance:.2f}", "largest load, relative to an even share")
    yield KeyFigure("Dropped", f"{last.drop_rate:.1%}", "of the assignments")
