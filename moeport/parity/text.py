"""A comparison as text: tables for the terminal, and the same tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from moeport.pages.tables import Table
from moeport.parity.result import Comparison, Report, RoutingResult, TensorResult

SHOWN = 12
"""Maximum number of tensors that are listed; JSON has all."""
STYLES = {"pass": "bold green", "warn": "bold yellow", "fail": "bold red"}
NAMES = {"pass": "pass", "warn": "WARN", "fail": "FAIL"}


def render(report: Report) -> Group:
    """For `rich.console.Console.print`: the first line of each comparison, then its tables."""
    parts: list[Text | RichTable] = []
    for comparison in report.comparisons:
        parts.append(Text(comparison.headline, style=STYLES[comparison.verdict]))
        parts += [Text(line) for line in lines(comparison)]
        parts += [table.drawn() for table in tables(comparison)]
    return Group(*parts)


def markdown(report: Report) -> str:
    """The same as Markdown, for an issue or a pull request."""
    parts: list[str] = []
    for comparison in report.comparisons:
        parts.append(f"## {comparison.headline}")
        parts.append("\n".join(f"- {line}" for line in lines(comparison)))
        for table in tables(comparison):
            drawn = [
                f"**{table.title}**",
                "",
                f"| {' | '.join(table.header)} |",
                f"|{'---|' * len(table.header)}",
                *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table.rows),
            ]
            parts.append("\n".join(drawn))
    return "\n\n".join(parts) + "\n"


def tables(comparison: Comparison) -> list[Table]:
    """The tables of a comparison that are not empty."""
    found = [
        coverage_table(comparison),
        kinds_table(comparison.tensors),
        failing_table(comparison),
        alone_table(comparison),
        inputs_table(comparison),
        routing_table(comparison.routing),
        flips_table(comparison.routing),
        trajectory_table(comparison),
        differences_table(comparison),
    ]
    return [table for table in found if table.rows]


def lines(comparison: Comparison) -> list[str]:
    """The two sides, and the notes."""
    found = []
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        versions = side.environment.get("versions", {})
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        found.append(
            f"{letter} is {side.name}: {side.environment.get('device', 'unknown device')}, {side.dtype}; {shown}"
        )
    if comparison.replayed:
        found.append("the forward pass and its gradients are those of B with A's routing")
    return found + comparison.notes


def coverage_table(comparison: Comparison) -> Table:
    """A row for each part: what was compared, what was not, and why."""
    rows = [
        (row.part, row.judged, f"{row.compared:,}", f"{row.of_a:,}", f"{row.of_b:,}", row.reason)
        for row in comparison.coverage
    ]
    return Table("What was compared", ("Part", "Judged", "Compared", "Of A", "Of B", "Why"), rows)


def alone_table(comparison: Comparison) -> Table:
    """The first tensors that only one side has, in the order of execution."""
    alone = comparison.one_sided
    names = {"A": comparison.a.name, "B": comparison.b.name}
    rows = [(f"{t.side}: {names[t.side]}", t.name, t.after or "") for t in alone[:SHOWN]]
    more = f" (the first {SHOWN} of {len(alone)})" if len(alone) > SHOWN else ""
    return Table(f"Tensors that only one side has{more}", ("Side", "Tensor", "After"), rows)


def kinds_table(tensors: Sequence[TensorResult]) -> Table:
    """A row for each kind of tensor."""
    rows = []
    for kind in dict.fromkeys(tensor.kind for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.kind == kind]
        count = {verdict: sum(tensor.verdict == verdict for tensor in group) for verdict in NAMES}
        top = max(group, key=lambda t: t.error / t.limit if t.limit else t.error)
        free = [tensor.free_error for tensor in group if tensor.free_error is not None]
        rows.append(
            (
                kind,
                str(count["pass"]),
                str(count["warn"]),
                str(count["fail"]),
                number(top.error),
                f"{top.limit:.0e}" if top.limit else "0",
                number(max(free)) if free else "",
                top.name,
            )
        )
    header = ("Kind", "Pass", "Warn", "Fail", "Error", "Limit", "Own routing", "Nearest to its limit")
    return Table("Tensors", header, rows)


def failing_table(comparison: Comparison) -> Table:
    """The first tensors that do not pass, in the order of execution."""
    odd = [tensor for tensor in comparison.tensors if tensor.verdict != "pass"]
    rows = [(str(t.order), NAMES[t.verdict], t.name, t.op or "", t.reason, t.hint or "") for t in odd[:SHOWN]]
    more = f" (the first {SHOWN} of {len(odd)})" if len(odd) > SHOWN else ""
    header = ("Order", "Verdict", "Tensor", "Operation", "Why", "Looks like")
    return Table(f"In the order of execution{more}", header, rows)


def inputs_table(comparison: Comparison) -> Table:
    """The inputs of the culprit."""
    culprit = comparison.culprit
    rows = [(name, number(error), NAMES[verdict]) for name, error, verdict in culprit.inputs] if culprit else []
    return Table(f"Inputs of {culprit.name}" if culprit else "", ("Input", "Error", "Verdict"), rows)


def routing_table(routing: Sequence[RoutingResult]) -> Table:
    """A row for each decision."""
    rows = [
        (
            found.name,
            str(found.choices),
            f"{found.agreement:.2%}",
            "" if found.agreement_replayed is None else f"{found.agreement_replayed:.2%}",
            str(found.near_ties),
            str(found.other_scores),
            str(found.unexplained),
        )
        for found in routing
    ]
    header = ("Decision", "Choices", "Agree", "Agree, A's routing", "Near ties", "Other scores", "Unexplained")
    return Table("Routing", header, rows)


def flips_table(routing: Sequence[RoutingResult], each: int = 3, shown: int = SHOWN) -> Table:
    """The choices that differ, at most `each` per decision and `shown` in total."""
    rows = [
        (found.name, str(f.row), str(f.choice), f"{f.a} / {f.b}", number(f.gap), number(f.error), f.cause)
        for found in routing
        for f in found.flips[:each]
    ]
    header = ("Decision", "Row", "Choice", "A / B", "Gap", "Error of the scores", "Cause")
    return Table("Choices that differ, the widest gaps", header, rows[:shown])


def trajectory_table(comparison: Comparison) -> Table:
    """A row for each step."""
    rows = [
        (
            str(step.step),
            f"{step.loss_a:.6f}",
            f"{step.loss_b:.6f}",
            number(step.difference),
            f"{step.limit:.0e}",
            NAMES[step.verdict],
            step.reason,
        )
        for step in comparison.trajectory
    ]
    return Table("Trajectory", ("Step", "Loss of A", "Loss of B", "Difference", "Limit", "Verdict", "Why"), rows)


def differences_table(comparison: Comparison) -> Table:
    """Differences between the sides, other than in tensors."""
    rows = [(difference.key, difference.a, difference.b) for difference in comparison.differences]
    return Table("What differs between the sides", ("What", "A", "B"), rows)


def number(value: float) -> str:
    """A short form of an error."""
    return "0" if value == 0 else f"{value:.1e}"
