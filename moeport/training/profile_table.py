"""What a profile found, as tables for the terminal and charts for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeport.core.parts import KINDS
from moeport.pages.charts import Bar
from moeport.pages.tables import Table

HELD_LABELS = {
    "parameters": "parameters",
    "copies": "parameters in the compute type",
    "gradients": "gradients",
    "optimizer": "state of the optimiser",
}
ACTIVATION_LABELS = {"loss": "embedding, logits, loss"}
"""Names of kinds that differ from those of the table of times."""


@dataclass(frozen=True)
class ProfileCharts:
    """What the report shows of a profile."""

    text: str
    table: Table | None
    bars: list[Bar]
    memory_text: str
    memory: Table | None
    memory_bars: list[Bar]


def tables(profile: Mapping[str, Any]) -> list[Table]:
    """The tables that a run prints at its end."""
    found = []
    if "kinds" in profile:
        found.append(_times(profile))
    if "memory" in profile:
        found.append(_memory(profile["memory"]))
    return found


def charts(profile: Mapping[str, Any]) -> ProfileCharts:
    """What the report shows of a profile."""
    has_times, has_memory = "kinds" in profile, "memory" in profile
    return ProfileCharts(
        text=_times_text(profile),
        table=_times(profile) if has_times else None,
        bars=_time_bars(profile) if has_times else [],
        memory_text=_memory_text(profile["memory"]) if has_memory else "",
        memory=_memory(profile["memory"]) if has_memory else None,
        memory_bars=_memory_bars(profile["memory"]) if has_memory else [],
    )


def _named(profile: Mapping[str, Any]) -> str:
    first, last = profile["steps"]
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _times_text(profile: Mapping[str, Any]) -> str:
    ranks = profile["ranks"]
    if "kinds" not in profile:
        return (
            f"{_named(profile).capitalize()} were traced; the framework's profiler does not tell where the operations "
            "were called, so there is no table by kind."
        )
    of = "the thread that runs the steps" if profile["clock"] == "cpu" else "the device"
    text = f"{_named(profile).capitalize()}: time of {of}, forward and backward"
    text += f", mean over {ranks} ranks with the least and the most." if ranks > 1 else "."
    usual, seconds = profile["usual_step_seconds"], profile["step_seconds"]["mean"]
    if usual:
        text += f" A profiled step took {seconds * 1e3:,.1f} ms; the median of those before is {usual * 1e3:,.1f} ms."
    overlapped = profile["overlapped_communication"]["mean"]
    if overlapped:
        text += f" Another {overlapped * 1e3:,.2f} ms of communication were hidden behind computation."
    others = [f"{name} {seconds * 1e3:.2f} ms" for name, seconds in profile["others"] if seconds >= 1e-5]
    if others:
        text += f" The largest of what belongs to no part: {', '.join(others)}."
    return text


def _times(profile: Mapping[str, Any]) -> Table:
    several = profile["ranks"] > 1
    rows = [
        [label, _ms(profile["kinds"][kind]["mean"]), f"{profile['kinds'][kind]['share']:.1%}"]
        + ([_ms(profile["kinds"][kind]["min"]), _ms(profile["kinds"][kind]["max"])] if several else [])
        for kind, label in KINDS.items()
    ]
    total = profile["step_seconds"]
    rows.append(
        ["whole step", _ms(total["mean"]), "100.0%"] + ([_ms(total["min"]), _ms(total["max"])] if several else [])
    )
    header = ["kind", "ms per step", "share"] + (["least", "most"] if several else [])
    return Table(f"Where a step's time goes: {_named(profile)}", header, rows)


def _time_bars(profile: Mapping[str, Any]) -> list[Bar]:
    kinds = profile["kinds"]
    largest = max(kinds[kind]["share"] for kind in KINDS) or 1.0
    return [
        Bar(label, f"{kinds[kind]['share']:.1%}", 100 * kinds[kind]["share"] / largest)
        for kind, label in KINDS.items()
        if kinds[kind]["mean"]
    ]


def _held(memory: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Bytes by label: what is held, then the activations by kind."""
    found = {label: memory[name] for name, label in HELD_LABELS.items() if memory[name]["max"]}
    for kind, spread in sorted(memory["activations"].items(), key=lambda item: -item[1]["mean"]):
        found[f"activations: {ACTIVATION_LABELS.get(kind, KINDS[kind])}"] = spread
    return found


def _memory(memory: Mapping[str, Any]) -> Table:
    planned = memory["planned"]
    estimates = {label: planned[name] for name, label in HELD_LABELS.items() if name in planned}
    rows = [
        [
            label,
            _mib(spread["mean"]),
            _per_token(spread["mean"], memory),
            _mib(estimates[label]) if label in estimates else "",
        ]
        for label, spread in _held(memory).items()
    ]
    total = sum(spread["mean"] for spread in memory["activations"].values())
    rows.append(["activations, all", _mib(total), _per_token(total, memory), _mib(planned["activations"])])
    for name, label in (("temporary", "temporary, at the peak"), ("peak", "peak of what a step allocates")):
        if name in memory:
            rows.append([label, _mib(memory[name]["mean"]), _per_token(memory[name]["mean"], memory), ""])
    return Table(
        f"Memory of a rank, {memory['tokens']:,} tokens in a micro-batch",
        ["kind", "MiB", "bytes per token", "MiB by moeport plan"],
        rows,
    )


def _memory_text(memory: Mapping[str, Any]) -> str:
    return (
        f"Of one rank, with {memory['tokens']:,} tokens in a micro-batch. Activations are what is held between the "
        "forward and the backward pass, by the part that keeps it first. Temporary is the peak beyond them, with the "
        "gradients that are there by then."
    )


def _memory_bars(memory: Mapping[str, Any]) -> list[Bar]:
    held = {label: spread["mean"] for label, spread in _held(memory).items()}
    if "temporary" in memory:
        held["temporary, at the peak"] = memory["temporary"]["mean"]
    largest = max(held.values()) or 1.0
    return [Bar(label, f"{_mib(size)} MiB", 100 * size / largest) for label, size in held.items()]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.2f}"


def _per_token(size: float, memory: Mapping[str, Any]) -> str:
    return f"{size / memory['tokens']:,.0f}"
