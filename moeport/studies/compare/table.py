"""A comparison as a table for the terminal and as Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moeport.pages.charts import number
from moeport.studies.compare.figures import ALL_TO_ALL, Figures
from moeport.studies.compare.outcome import Comparison, Outcome, Tried
from moeport.studies.compare.spread import METHOD, Paired, spread
from moeport.training.task import FREQUENT_SHARE


@dataclass(frozen=True)
class Column:
    """One column of figures."""

    title: str
    figure: str
    """A name in `Figures.values`; runs that have none, or None, are shown without."""
    show: Callable[[float], str]
    to_baseline: Literal["", "difference", "ratio"] = ""
    """How it is relative to the baseline, whose own value says nothing: paired by seed, with its interval."""
    is_cost: bool = False
    """Whether it is a cost rather than a quality."""


def _rounded(value: float) -> str:
    return number(value, abs(value) / 100)


LOSS_OF = "val_loss."
COLUMNS = (
    Column("val. loss", "val_loss", "{:.4f}".format),
    Column("to baseline", "val_loss", "{:+.4f}".format, "difference"),
    Column("bits/byte", "val_bits_per_byte", "{:.4f}".format),
    Column("accuracy", "val_accuracy", "{:.2%}".format),
    Column("dropped", "drop_rate", "{:.2%}".format),
    Column("imbalance", "imbalance", "{:.2f}".format),
    Column("local", "local_share", "{:.1%}".format),
    Column("active", "parameters_active", _rounded, is_cost=True),
    Column("rows/token", "rows_per_token", "{:.3f}".format, is_cost=True),
    Column("rows mean", "rows_mean", "{:.1f}".format, is_cost=True),
    Column("rows max", "rows_max", "{:.1f}".format, is_cost=True),
    Column("rows ratio", "rows_total", "{:.3f}".format, "ratio", is_cost=True),
    Column("expert FLOPs/token", "expert_flops_per_token", _rounded, is_cost=True),
    Column("FLOPs/token", "flops_per_token", _rounded, is_cost=True),
    Column("FLOPs ratio", "flops_total", "{:.3f}".format, "ratio", is_cost=True),
    Column("step, s", "step_time", "{:.3f}".format, is_cost=True),
    Column("step ratio", "step_time", "{:.2f}".format, "ratio", is_cost=True),
    Column("all-to-all B/token", "all_to_all_bytes", "{:,.0f}".format, is_cost=True),
)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    parameters: str
    """Number of trained parameters."""
    cells: tuple[str, ...]
    """In the order of `columns`; empty if no run has finished."""
    problems: tuple[str, ...]
    """The reasons why runs have no result."""
    is_baseline: bool


def columns(comparison: Comparison) -> list[Column]:
    """The columns for which runs of this kind have values; each part of the validation loss has one."""
    figures = [one.values() for name in comparison.plan.names for one in comparison.figures(name).values()]
    known = list(dict.fromkeys(name for one in figures for name, value in one.items() if value is not None))
    parts = [name for name in known if name.startswith(LOSS_OF)]
    qualities = [column for column in COLUMNS if column.figure in known and not column.is_cost]
    costs = [column for column in COLUMNS if column.figure in known and column.is_cost]
    return [
        *qualities,
        *(Column(f"loss, {name.removeprefix(LOSS_OF)}", name, "{:.4f}".format) for name in parts),
        *costs,
    ]


def rows(comparison: Comparison) -> list[Row]:
    """A row for each config, in order."""
    result = []
    for name in comparison.plan.names:
        problems = [f"{_which(comparison, o)}{o.problem}" for o in comparison.of(name) if o.problem]
        figures: Figures | None = next(iter(comparison.figures(name).values()), None)
        parameters = _rounded(figures.parameters_total) if figures else ""
        cells = tuple(_cell(comparison, name, column) for column in columns(comparison)) if figures else ()
        result.append(Row(name, parameters, cells, tuple(problems), name == comparison.plan.baseline))
    return result


def _which(comparison: Comparison, outcome: Outcome) -> str:
    """Which of a config's runs it is, if there are several."""
    if len(comparison.of(outcome.run.name)) == 1:
        return ""
    sweep = comparison.plan.sweeps.get(outcome.run.name)
    return f"{f'{sweep.key} {outcome.run.value}, ' if sweep else ''}seed {outcome.run.seed}: "


def explanations(comparison: Comparison) -> list[str]:
    """Explains the columns, in a sentence or two each."""
    plan = comparison.plan
    config = plan.config(plan.baseline)
    tokens = config.training.batch_size * config.data.tokens_per_sequence
    return [
        f"{config.training.steps:,} steps of {tokens:,} tokens; {comparison.data}. {_of_seeds(plan.seeds)} "
        f"Baseline: {plan.baseline}; val. loss in nats per {'image' if config.data.is_images else 'token'}.",
        *_of_sweeps(comparison),
        "Dropped, imbalance, local share, rows and figures derived from rows are means over the second half of the "
        "steps; the ratios of rows and of FLOPs are over all steps. Rows are what the routed experts compute, without "
        "dropped assignments and padding: per token over all layers; per step for an expert, mean over experts and "
        "layers; and for the busiest expert of each layer, mean over the layers.",
        "FLOPs are those of the forward and backward pass with these rows, so they hold for experts of any width: "
        "expert FLOPs are those of routed and shared experts, the others those of the whole model. Active parameters "
        "are those that a token uses on average, with these rows.",
        *_of_parts(comparison),
        "Step time is a median. The runs shared one machine, one after another; other load on it affects the times.",
        f"All-to-all is computed, not measured: {ALL_TO_ALL}, over all layers, for experts and tokens spread evenly "
        f"over N = {comparison.ranks} ranks.",
        *comparison.notes(),
    ]


def _of_parts(comparison: Comparison) -> Iterator[str]:
    """What the losses on a part of the validation set are, as far as there are any."""
    found = [one for name in comparison.plan.names for one in comparison.figures(name).values()]
    if any(one.val_loss_by_frequency for one in found):
        yield (
            f"Loss, frequent and rare: frequent ids are the smallest set that makes up {FREQUENT_SHARE:.0%} of the "
            "training tokens, rare ids all others; a prediction is classed by the id to be predicted."
        )
    if any(one.val_loss_by_objective for one in found):
        yield (
            "Loss, of a denoiser: nats per target of the held-out sequences that it rearranges; the loss without a "
            "name is that of next-token prediction, whatever a run was trained for."
        )
    if any(one.local_share is not None for one in found):
        yield "Local: choices of experts on the token's own node, as a share of all choices, mean over the layers."


def _of_seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"Seed {seeds[0]}: one run each, which cannot tell a difference between routers from one between seeds."
    return (
        f"Seeds {', '.join(map(str, seeds))}: mean ± standard deviation. Differences and ratios are paired by seed and "
        f"have their interval in brackets: {METHOD}. An interval that includes no difference is marked ~: these seeds "
        "do not resolve it. Intervals are not corrected for their number; of 20 comparisons without a difference, "
        "about one shows one by chance."
    )


def _of_sweeps(comparison: Comparison) -> Iterator[str]:
    """What was swept, how the best value was chosen, and what it is."""
    plan = comparison.plan
    if not plan.sweeps:
        return
    seeds = plan.seeds
    if len(seeds) == 1:
        how = f"the lowest validation loss on seed {seeds[0]}"
    elif plan.chosen_on == "first":
        how = f"the lowest validation loss on seed {seeds[0]}, which also counts in the figures"
    else:
        how = "the lowest mean validation loss over all seeds, which also count in the figures"
    yield f"Each config has the value of the swept key with {how}; so the losses shown are slightly too good."
    for name in plan.sweeps:
        found = ", ".join(f"{each.value}: {_loss_of(each)}" for each in comparison.tried(name))
        chosen = comparison.choices.get(name, "none yet")
        yield f"{name}: {plan.sweeps[name].key} {chosen} of {found}."


def _loss_of(tried: Tried) -> str:
    if tried.diverged:
        return "diverged"
    return f"{tried.loss:.4f}" if math.isfinite(tried.loss) else "; ".join(dict.fromkeys(tried.problems))


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
        f"| Router | Parameters | {' | '.join(column.title for column in shown)} |",
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


def _cell(comparison: Comparison, name: str, column: Column) -> str:
    if column.to_baseline:
        if name == comparison.plan.baseline:
            return "-"
        found = comparison.difference(name, column.figure, column.to_baseline == "ratio")
        return "-" if found is None else _shown_difference(found, column.show)
    values = [figures.values().get(column.figure) for figures in comparison.figures(name).values()]
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    value = spread(known)
    return column.show(value.mean) + ("" if value.deviation is None else f" ± {column.show(value.deviation)}")


def _shown_difference(found: Paired, show: Callable[[float], str]) -> str:
    if found.low is None or found.high is None:
        return show(found.mean)
    mark = " ~" if found.verdict == "not resolved" else ""
    return f"{show(found.mean)} [{show(found.low)}, {show(found.high)}]{mark}"
