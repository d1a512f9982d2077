"""A report as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from moeport.pages.tables import Table
from moeport.pages.template import load_template
from moeport.parity import text
from moeport.parity.html_charts import CLASSES, Agreement, Bars, Chart, agreements, bars, depth_chart, step_charts
from moeport.parity.metrics import Distribution
from moeport.parity.result import Comparison, Report, Side, TensorResult

LISTED = 2000
"""Maximum number of tensors in the table of all; if there are more, the worst ones are listed."""
CARDS = 6
"""Number of worst tensors that are visible; the others with a histogram are folded."""


@dataclass(frozen=True)
class Card:
    """One of the worst tensors."""

    tensor: TensorResult
    values: Bars
    """Histograms of A and of B."""
    difference: Bars
    decades: Bars
    """Histogram of relative errors by decade."""


@dataclass(frozen=True)
class View:
    """What the page shows of a comparison."""

    found: Comparison
    lines: Sequence[str]
    figures: Sequence[tuple[str, str, str]]
    """Label, value, note."""
    depth: Sequence[Chart]
    equal: Sequence[str]
    """Kinds without a chart, since they are bit-identical."""
    steps: Sequence[Chart]
    agreements: Sequence[Agreement]
    cards: Sequence[Card]
    unseen: int
    """Number of tensors of which only statistics were kept."""
    coverage: Table
    alone: Table
    kinds: Table
    inputs: Table
    routing: Table
    flips: Table
    trajectory: Table
    differences: Table
    listed: Sequence[TensorResult]
    sides: Sequence[tuple[str, Side, str]]
    """Letter, side, and the side's environment and config as YAML."""


def page(report: Report) -> str:
    """The page, with one section per comparison."""
    template = load_template("parity.html", Path(__file__).parent / "templates", filters={"number": text.number})
    views = [_view(found) for found in report.comparisons]
    return template.render(report=report, views=views, cards_shown=CARDS)


def _view(found: Comparison) -> View:
    charts = {kind: depth_chart(found, kind) for kind in CLASSES}
    present = {tensor.kind for tensor in found.tensors}
    worst_first = sorted(found.tensors, key=lambda t: t.severity, reverse=True)
    cards = [_card(t, t.distribution) for t in worst_first if t.distribution]
    listed = found.tensors
    if len(listed) > LISTED:
        listed = sorted(worst_first[:LISTED], key=lambda t: t.order)
    return View(
        found=found,
        lines=text.lines(found),
        figures=_figures(found),
        depth=[chart for chart in charts.values() if chart],
        equal=[CLASSES[kind].lower() for kind in CLASSES if kind in present and not charts[kind]],
        steps=step_charts(found),
        agreements=agreements(found.routing),
        cards=cards,
        unseen=sum(tensor.keep == "statistics" for tensor in found.tensors),
        coverage=text.coverage_table(found),
        alone=text.alone_table(found),
        kinds=text.kinds_table(found.tensors),
        inputs=text.inputs_table(found),
        routing=text.routing_table(found.routing),
        flips=text.flips_table(found.routing, each=10, shown=100),
        trajectory=text.trajectory_table(found),
        differences=text.differences_table(found),
        listed=listed,
        sides=[(letter, side, _side_text(side)) for letter, side in (("A", found.a), ("B", found.b))],
    )


def _side_text(side: Side) -> str:
    parts = {"environment": side.environment, "config": side.config, "notes": side.notes}
    plain = json.loads(json.dumps({key: value for key, value in parts.items() if value}))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _figures(found: Comparison) -> list[tuple[str, str, str]]:
    count = {verdict: sum(t.verdict == verdict for t in found.tensors) for verdict in ("warn", "fail")}
    figures = [("Tensors compared", f"{len(found.tensors):,}", f"{count['fail']} fail, {count['warn']} warn")]
    for kind in ("activation", "gradient"):
        group = [t for t in found.tensors if t.kind == kind]
        if group:
            top = max(group, key=lambda t: t.error)
            figures.append(
                (f"Largest error of {CLASSES[kind].lower()}", text.number(top.error), f"limit {top.limit:.0e}")
            )
    choices = sum(r.choices for r in found.routing)
    if choices:
        own = sum(r.agreement * r.choices for r in found.routing) / choices
        note = f"of {choices:,} choices"
        if found.replayed and all(r.agreement_replayed is not None for r in found.routing):
            replayed = sum((r.agreement_replayed or 0.0) * r.choices for r in found.routing) / choices
            note += f"; {replayed:.2%} with A's routing"
        figures.append(("Routing agreement", f"{own:.2%}", note))
    if found.trajectory:
        top_step = max(found.trajectory, key=lambda s: s.difference)
        figures.append(
            ("Largest difference of the loss", text.number(top_step.difference), f"at step {top_step.step}, relative")
        )
    return figures


def _card(tensor: TensorResult, counts: Distribution | None) -> Card:
    assert counts
    decades = tensor.histogram or {}
    labels = [*decades]
    return Card(
        tensor,
        bars(text.number(counts.low), text.number(counts.high), counts.a, counts.b),
        bars(text.number(counts.low_difference), text.number(counts.high_difference), counts.difference),
        bars(labels[0], labels[-1], [*decades.values()]),
    )
