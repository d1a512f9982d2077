"""`moeport inspect` on a terminal, and the figures that head the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from moeport.pages.tables import Table
from moeport.studies.inspect.inspect import Found, LayerFound


@dataclass(frozen=True)
class Headline:
    """A figure of the summary."""

    label: str
    value: str
    note: str


def headlines(found: Found) -> list[Headline]:
    """What matters most, means over the layers."""
    made = []
    ids, chance, places = (
        float(np.mean([getattr(each, name) for each in spreads]))
        for name, spreads in (
            ("mean", [layer.by_id for layer in found.layers]),
            ("chance", [layer.by_id for layer in found.layers]),
            ("mean", [layer.by_position for layer in found.layers]),
        )
    )
    if np.isfinite(ids):
        made.append(Headline("Deviation by token id", f"{ids:.3f}", f"{chance:.3f} by chance"))
    if np.isfinite(places):
        made.append(Headline("Deviation by position", f"{places:.3f}", "0 is an even division"))
    if any(layer.counts.capacities for layer in found.layers):
        first, last = (np.mean([end_rates(layer)[i] for layer in found.layers]) for i in (0, 1))
        made.append(Headline("Dropped, last quarter", f"{last:.1%}", f"first quarter of positions: {first:.1%}"))
    if found.history:
        earliest = found.history[0]
        overlap = float(np.mean(earliest.overlap))
        if np.isfinite(overlap):
            made.append(Headline("Overlap of routing", f"{overlap:.2f}", f"step {earliest.step:,} with {found.step:,}"))
    if found.robustness is not None:
        rise = round(found.robustness.loss_without - found.robustness.loss, 2) + 0.0  # so that -0.0 has no sign
        made.append(Headline("Loss without first choices", f"{rise:+.2f}", f"from {found.robustness.loss:.3f} nats"))
    separation = float(np.mean([layer.geometry.separation for layer in found.layers]))
    if np.isfinite(separation):
        made.append(Headline("Separation CH", f"{separation:.3f}", "of the experts' tokens"))
    angles = np.mean([[layer.geometry.own_angle, layer.geometry.other_angle] for layer in found.layers], axis=0)
    if np.isfinite(angles).all():
        made.append(Headline("Angle to own gate row", f"{angles[0]:.0f}°", f"to the others: {angles[1]:.0f}°"))
    return made


def end_rates(layer: LayerFound) -> tuple[float, float]:
    """Drop rates in the first and in the last quarter of the positions."""
    counts = layer.counts
    chosen_P, quarter = counts.position_PE.sum(1), max(1, len(counts.dropped_P) // 4)
    ends = (slice(None, quarter), slice(-quarter, None))
    first, last = (float(counts.dropped_P[end].sum() / max(1, chosen_P[end].sum())) for end in ends)
    return first, last


def layer_table(found: Found) -> Table:
    """A row for each layer."""
    header = ["layer", "busiest expert", "by token id", "chance", "by position", "chance", "CH", "own angle", "others"]
    has_drops = any(layer.counts.capacities for layer in found.layers)
    header += ["dropped", "first quarter", "last quarter"] if has_drops else []
    header += [f"overlap with step {found.history[0].step:,}"] if found.history else []
    rows = []
    for number, layer in enumerate(found.layers):
        load_E = layer.counts.load / max(1, layer.counts.load.sum())
        spreads = (layer.by_id.mean, layer.by_id.chance, layer.by_position.mean, layer.by_position.chance)
        row = [layer.name, f"{load_E.max():.1%}", *map(_number, (*spreads, layer.geometry.separation))]
        row += [_degrees(layer.geometry.own_angle), _degrees(layer.geometry.other_angle)]
        row += [f"{rate:.1%}" for rate in (layer.counts.drop_rate, *end_rates(layer))] if has_drops else []
        row += [_number(found.history[0].overlap[number])] if found.history else []
        rows.append(row)
    return Table.of("Routing by layer", header, rows)


def bounds_table(found: Found) -> list[Table]:
    """Bounds of LocMoE's theory against the loads, by layer; none without gate rows."""
    header = ["layer", "mean cosine", "LocMoE", "largest cosine", "LocMoE+", "mean load", "busiest expert", "capacity"]
    rows = []
    for layer in found.layers:
        if layer.bounds is not None:
            counts, shape = layer.counts, layer.geometry
            rows.append(
                [
                    layer.name,
                    *(f"{shape.mean_cosine:.3f}", _rows(layer.bounds.locmoe)),
                    *(f"{shape.largest_cosine:.3f}", _rows(layer.bounds.locmoe_plus)),
                    *(_rows(counts.mean_load), _rows(max(counts.busiest))),
                    f"{max(counts.capacities):,}" if counts.capacities else "none",
                ]
            )
    return [Table.of("Assignments of an expert per batch", header, rows)] if rows else []


def robustness_table(found: Found) -> list[Table]:
    """The loss with and without first choices; none if it was not measured."""
    if found.robustness is None:
        return []
    losses = {"as trained": found.robustness.loss, "without first choices": found.robustness.loss_without}
    rows = [[name, f"{loss:.4f}", f"{np.exp(min(loss, 700.0)):,.2f}"] for name, loss in losses.items()]
    return [Table.of("Loss", ["routing", "nats per token", "perplexity"], rows)]


def lines(found: Found) -> Sequence[str]:
    """What was looked at, a line each."""
    sets = ", ".join(found.keys.datasets)
    return [found.model, f"{found.checkpoint}; {found.tokens:,} tokens of {sets}", found.capacity]


def render(found: Found) -> RenderableType:
    """The summary for a console."""
    parts: list[RenderableType] = [Text(line) for line in lines(found)]
    parts += [table.drawn() for table in (layer_table(found), *bounds_table(found), *robustness_table(found))]
    return Group(*parts, *(Text(note, style="dim") for note in found.notes))


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"


def _rows(value: float) -> str:
    if not np.isfinite(value) or value >= 1e7:
        return "> 1e7"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _degrees(value: float) -> str:
    return f"{value:.1f}°" if np.isfinite(value) else "-"
