"""A comparison as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moeport.pages.charts import number
from moeport.studies.compare.compare import Comparison
from moeport.studies.compare.figures import ALL_TO_ALL, Figures


@dataclass(frozen=True)
class Spread:
    """A value over several seeds."""

    mean: float
    deviation: float | None
    """Standard deviation over the seeds; None for a single seed."""


@dataclass(frozen=True)
class Column:
    """One column of figures."""

    title: str
    value: Callable[[Figures, Figures], float | None]
    """Computed from a run and the baseline's run with the same seed; None if runs of this kind have no such value."""
    show: Callable[[float], str]
    relative: bool = False
    """Whether it is relative to the baseline, whose own value says nothing."""
    is_cost: bool = False
    """Whether it is a cost rather than a quality."""


def _rounded(value: float) -> str:
    return number(value, abs(value) / 100)


COLUMNS = (
    Column("val. loss", lambda run, base: run.val_loss, "{:.4f}".format),
    Column("to baseline", lambda run, base: run.val_loss - base.val_loss, "{:+.4f}".format, relative=True),
    Column("bits/byte", lambda run, base: run.val_bits_per_byte, "{:.4f}".format),
    Column("accuracy", lambda run, base: run.val_accuracy, "{:.2%}".format),
    Column("dropped", lambda run, base: run.drop_rate, "{:.2%}".format),
    Column("imbalance", lambda run, base: run.imbalance, "{:.2f}".format),
    Column("rows mean", lambda run, base: run.rows_mean, "{:.1f}".format, is_cost=True),
    Column("rows max", lambda run, base: run.rows_max, "{:.1f}".format, is_cost=True),
    Column("step, s", lambda run, base: run.step_time, "{:.3f}".format, is_cost=True),
    Column(
        "step ratio", lambda run, base: run.step_time / base.step_time, "{:.2f}".format, relative=True, is_cost=True
    ),
    Column("all-to-all B/token", lambda run, base: run.all_to_all_bytes, "{:,.0f}".format, is_cost=True),
)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    parameters: str
    """Total and active."""
    cells: tuple[str, ...]
    """In the order of `columns`; empty if no run has finished."""
    problems: tuple[str, ...]
    """The reasons why runs have no result."""
    is_baseline: bool


def columns(comparison: Comparison) -> list[Column]:
    """The columns for which runs of this kind have values."""
    figures = [one for name in comparison.plan.names for one in comparison.figures(name).values()]
    return [column for column in COLUMNS if any(column.value(one, one) is not None for one in figures)]


def rows(comparison: Comparison) -> list[Row]:
    """A row for each config, in order."""
    result = []
    for name in comparison.plan.names:
        outcomes, by_seed = comparison.of(name), comparison.figures(name)
        several = len(outcomes) > 1
        problems = [f"seed {o.run.seed}: {o.problem}" if several else o.problem for o in outcomes if o.problem]
        figures = next(iter(by_seed.values()), None)
        parameters = f"{_rounded(figures.parameters_total)} / {_rounded(figures.parameters_active)}" if figures else ""
        cells = tuple(_cell(comparison, name, column) for column in columns(comparison)) if figures else ()
        result.append(Row(name, parameters, cells, tuple(problems), name == comparison.plan.baseline))
    return result


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def explanations(comparison: Comparison) -> list[str]:
    """Explains the columns, in a sentence or two each."""
    plan = comparison.plan
    config = plan.config(plan.baseline)
    seeds = plan.seeds
    tokens = config.training.batch_size * config.data.tokens_per_sequence
    of_seeds = (
        f"Seeds {', '.join(map(str, seeds))}: mean ± standard deviation; differences and ratios are per seed. "
        if len(seeds) > 1
        else f"Seed {seeds[0]}: one run each, so small differences mean nothing. "
    )
    return [
        f"{config.training.steps:,} steps of {tokens:,} tokens; {comparison.data}. {of_seeds}"
        f"Baseline: {plan.baseline}; val. loss in nats per {'image' if config.data.is_images else 'token'}.",
        "Dropped, imbalance and rows are means over the second half of the steps. Rows: what an expert computes per "
        "step, mean over experts and layers, and for the busiest expert of each layer, mean over the layers.",
        "Step time is a median. The runs shared one machine, one after another; other load on it counts, so small "
        "differences mean nothing.",
        f"All-to-all is computed, not measured: {ALL_TO_ALL}, over all layers, for experts and tokens spread evenly "
        f"over N = {comparison.ranks} ranks.",
        *comparison.notes(),
    ]


def terminal(comparison: Comparison) -> Group:
    """For `rich.console.Console.print` with crop=False: two tables, since one is wider than most terminals."""
    found, shown = rows(comparison), columns(comparison)
    failures = [Text(f"{row.name}: {problem}", style="red") for row in found for problem in row.problems]
    texts = [Text(f"\n{line}", style="dim") for line in explanations(comparison)]
    return Group(*(_table(found, shown, is_cost) for is_cost in (False, True)), *failures, *texts)


def _table(found: Sequence[Row], shown: Sequence[Column], is_cost: bool) -> Table:
    """A table of the qualities or of the costs, whose columns are never narrower than their cells."""
    picked = [index for index, column in enumerate(shown) if column.is_cost == is_cost]
    header = ["router", *(["parameters"] if is_cost else []), *(shown[index].title for index in picked)]
    lines = [
        [row.name, *([row.parameters] if is_cost else []), *(row.cells[i] if row.cells else "-" for i in picked)]
        for row in found
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, title in enumerate(header):
        width = max(len(part) for part in [*title.split(), *(line[index] for line in lines)])
        table.add_column(title, min_width=width, justify="right" if index else "left")
    for row, line in zip(found, lines, strict=True):
        table.add_row(*map(Text, line), style="bold" if row.is_baseline else "")
    return table


def markdown(comparison: Comparison) -> str:
    """A table with its explanations, to be pasted into a document."""
    shown = columns(comparison)
    lines = [
        f"| Router | Parameters, active | {' | '.join(column.title for column in shown)} |",
        f"|---|---|{'--:|' * len(shown)}",
    ]
    failures = []
    for row in rows(comparison):
        name = f"**`{row.name}`**" if row.is_baseline else f"`{row.name}`"
        cells = (name, row.parameters, *(row.cells or ["-"] * len(shown)))
        lines.append(f"| {' | '.join(cells)} |")
        failures += [f"`{row.name}`: {problem}" for problem in row.problems]
    wrapped = [
        textwrap.fill(line, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for line in [*failures, *explanations(comparison)]
    ]
    return "\n".join([*lines, "", *wrapped]) + "\n"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as plain values."""
    plan = comparison.plan
    configs = []
    for name in plan.names:
        by_seed = comparison.figures(name)
        runs = [asdict(figures) for figures in by_seed.values()]
        known = [figure for figure, value in runs[0].items() if value is not None] if runs else []
        spreads = {figure: spread([run[figure] for run in runs]) for figure in known}
        configs.append(
            {
                "name": name,
                "differences": {d.key: {"baseline": d.before, "value": d.now} for d in plan.differences(name)},
                "mean": {figure: value.mean for figure, value in spreads.items()},
                "deviation": {figure: value.deviation for figure, value in spreads.items()},
                "runs": [
                    {
                        "seed": outcome.run.seed,
                        "run_dir": str(outcome.run.dir),
                        "problem": outcome.problem or None,
                        "figures": asdict(outcome.result.figures) if outcome.result else None,
                    }
                    for outcome in comparison.of(name)
                ],
            }
        )
    return {
        "baseline": plan.baseline,
        "seeds": plan.seeds,
        "ranks": comparison.ranks,
        "all_to_all_bytes": ALL_TO_ALL,
        "explanations": explanations(comparison),
        "configs": configs,
    }


def _cell(comparison: Comparison, name: str, column: Column) -> str:
    own, base = comparison.figures(name), comparison.figures(comparison.plan.baseline)
    if column.relative:
        own = {seed: figures for seed, figures in own.items() if seed in base}
    values = [column.value(figures, base.get(seed, figures)) for seed, figures in own.items()]
    known = [value for value in values if value is not None]
    if not known or (column.relative and name == comparison.plan.baseline):
        return "-"
    value = spread(known)
    deviation = "" if value.deviation is None else f" ± {column.show(value.deviation).lstrip('+')}"
    return column.show(value.mean) + deviation
