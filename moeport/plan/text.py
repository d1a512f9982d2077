"""What `moeport plan` prints: links, fits, tables, and the sentence that says why an exchange is the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeport.comm.exchange import EXCHANGES
from moeport.comm.load import Advantage, Demand
from moeport.pages.words import counted
from moeport.plan.compute import SpeedFit
from moeport.plan.cost import Cluster, Cost
from moeport.plan.fit import Fit
from moeport.plan.layer import Reason
from moeport.plan.planner import Placement

if TYPE_CHECKING:
    from rich.table import Table

CAUSES = {
    "latency": "the latency of messages",
    "intra": "the links inside a node",
    "inter": "the link between nodes",
    "copies": "copying rows",
}
SHARED = {"nothing": "", "node": "; the ranks of a node share its processor", "cluster": "; all on one machine"}


def sentence(reason: Reason | None) -> str:
    """Why an exchange is the fastest."""
    if reason is None:
        return "every rank has all experts: no rows move"
    said = [f"{reason.algorithm}: {_advantage(reason.advantage, reason.nodes)}"]
    said.append(f"{reason.cause_share:.0%} of its time goes to {CAUSES[reason.cause]}")
    if reason.hidden > 0:
        said.append(
            f"in {reason.chunks} chunks {reason.hidden:.0%} of it passes while experts compute or others travel"
        )
    said.append(", ".join(f"{name} takes {times:.2f} times as long" for name, times in reason.slower.items()))
    return "; ".join(filter(None, said))


def _advantage(found: Advantage | None, nodes: int) -> str:
    if found is None:
        one_node = "the experts of a copy are on one node, and no token crosses between nodes"
        return one_node if nodes == 1 else "its stages take the least time"
    own, other = (f"{value}" if isinstance(value, int) else f"{value:.1f}" for value in (found.own, found.other))
    if found.own < found.other:
        return f"{own} {found.quantity} instead of {other} with {found.against}"
    return f"{own} {found.quantity}; {found.against} has {other}, but its other stages take longer"


def cluster_lines(cluster: Cluster, fitted: Fit | None) -> list[str]:
    """The cluster and its links, and how well they fit what was measured."""
    nodes = f"{counted(cluster.nodes, 'node')} x {cluster.ranks_per_node}"
    lines = [f"{counted(cluster.ranks, 'rank')}: {nodes}{SHARED[cluster.shares]}"]
    links = cluster.links
    for name, link, unit in (
        ("inside a node", links.intra, "message"),
        ("between nodes", links.inter, "message"),
        ("copies", links.copies, "row"),
    ):
        bandwidth = "no limit seen" if np.isinf(link.bandwidth) else f"{link.bandwidth / 1e9:.3g} GB/s"
        lost = [
            f", {label} {speed / 1e9:.3g} GB/s"
            for label, speed in (("a pair of ranks", link.pair_bandwidth), ("nodes that meet", link.meeting_bandwidth))
            if np.isfinite(speed)
        ]
        lines.append(f"  {name:<14} {bandwidth}, {link.latency * 1e6:.3g} us per {unit}{''.join(lost)}")
    return [*lines, _fit_line("times", fitted.errors)] if fitted else lines


def speed_lines(found: SpeedFit) -> list[str]:
    """How fast ranks compute, and how well that fits what was measured."""
    speed = found.speed
    parts = [
        f"{seconds * scale:.3g} {unit}"
        for seconds, scale, unit in (
            (speed.flop, 1e12, "s per TFLOP"),
            (speed.parameter, 1e9, "ns per parameter"),
            (speed.block, 1e3, "ms per block"),
        )
        if seconds
    ]
    return [f"  {'compute':<14} {', '.join(parts) or 'no time seen'}", _fit_line("runs", found.errors)]


def _fit_line(what: str, error_S: np.ndarray) -> str:
    size_S = np.abs(error_S)
    return f"  fitted to {len(size_S)} {what}; median error {np.median(size_S):.0%}, largest {size_S.max():.0%}"


def exchange_table(found: Sequence[tuple[Demand, dict[str, Cost], Reason]]) -> Table:
    """A row per exchange: its time by each algorithm, the best one and why."""
    numbers = ("tokens\na rank", "choices", "experts", *(f"{name}\n(ms)" for name in EXCHANGES))
    table = _table(numbers)
    table.add_column("best, and why")
    for demand, costs, reason in found:
        table.add_row(
            *(f"{number:,}" for number in (demand.tokens, demand.top_k, demand.num_experts)),
            *(f"{cost.total * 1e3:.2f}" for cost in costs.values()),
            sentence(reason),
        )
    return table


def placement_table(found: Sequence[Placement]) -> Table:
    """A row per placement."""
    has_compute = found[0].compute is not None
    table = _table(
        [
            "parallelism\n.expert",
            "nodes of\na copy",
            "comm\n.algorithm",
            "comm\n.chunks",
            "a layer's\nexchange (ms)",
            "exchanges\n(ms/step)",
            "gradients\n(ms/step)",
            *(["compute\n(ms/step)", "step\n(ms)"] if has_compute else ["together\n(ms/step)"]),
            "parameters, gradients,\nmoments (GiB)",
            "activations,\nestimate (GiB)",
        ]
    )
    for each in found:
        table.add_row(*_placement_cells(each))
    return table


def _placement_cells(each: Placement) -> list[str]:
    compute = [f"{each.compute * 1e3:,.2f}"] if each.compute is not None else []
    return [
        str(each.expert),
        str(each.nodes),
        each.algorithm or "-",
        str(each.chunks) if each.algorithm else "-",
        f"{each.costs[each.algorithm].total * 1e3:,.3f}" if each.algorithm else "-",
        f"{each.exchange * 1e3:,.2f}",
        f"{each.gradients * 1e3:,.2f}",
        *compute,
        f"{each.step * 1e3:,.2f}",
        f"{(each.memory.total - each.memory.activations) / 2**30:,.3g}",
        f"{each.memory.activations / 2**30:,.3g}",
    ]


def placement_lines(found: Sequence[Placement]) -> list[str]:
    """The fastest placement and the next, and why."""
    best = found[0]
    lines = [f"Fastest: parallelism.expert = {best.expert}. {sentence(best.reason)}."]
    if len(found) > 1:
        other = found[1]
        lines.append(
            f"Next: parallelism.expert = {other.expert}, {other.step / best.step:.2f} times as long: exchanges take "
            f"{_difference(other.exchange - best.exchange)}, gradients {_difference(other.gradients - best.gradients)} "
            f"per step. {sentence(other.reason)}."
        )
    return lines


def _difference(seconds: float) -> str:
    return f"{abs(seconds) * 1e3:,.2f} ms {'more' if seconds >= 0 else 'less'}"


def _table(headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, a reason as its sentence, null for what has no limit."""
    if isinstance(value, Reason):
        return sentence(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and np.isinf(value) else value


def placement_figures(each: Placement) -> dict[str, Any]:
    """A placement as JSON has it."""
    return {**plain(each), "step": each.step, "reason": sentence(each.reason)}
