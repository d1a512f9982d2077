"""The key figures at the top of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeport.pages.charts import Axis, Bar, line_chart, number
from moeport.pages.lines import Drawn
from moeport.training.duration import duration
from moeport.training.metrics_table import StepMetrics
from moeport.training.run_metrics import RunMetrics


@dataclass(frozen=True)
class KeyFigure:
    """A key figure."""

    label: str
    value: str
    note: str = ""


def _validation(metrics: RunMetrics, summary: Mapping[str, Any], name: str) -> float | None:
    """The summary's value, or else that of the last evaluation, if any."""
    value = summary.get(name)
    return getattr(metrics.last_evaluation, name, None) if value is None else value


def key_figures(metrics: RunMetrics, summary: Mapping[str, Any], unit: str) -> list[KeyFigure]:
    """The main results of the run; unknown ones are left out. `unit` is the unit of the losses."""
    last, figures = metrics.last, []
    validation_loss = _validation(metrics, summary, "val_loss")
    if validation_loss is not None:
        figures.append(KeyFigure("Validation loss", f"{validation_loss:.4f}", unit))
    accuracy = _validation(metrics, summary, "val_accuracy")
    if accuracy is not None:
        figures.append(KeyFigure("Validation accuracy", f"{accuracy:.2%}", "of held-out images"))
    figures.append(KeyFigure("Last training loss", f"{last.loss:.4f}", unit))
    rate = summary.get("tokens_per_second") or np.nanmedian(metrics.series(StepMetrics, "tokens_per_second").y)
    figures.append(KeyFigure("Throughput", f"{rate:,.0f}", "tokens/s"))
    mfu = metrics.series(StepMetrics, "mfu").y
    if np.isfinite(mfu).any():
        figures.append(KeyFigure("MFU", f"{np.nanmedian(mfu):.1%}", "median"))
    if "wall_time" in summary:
        steps = f"{last.step:,} step" + ("" if last.step == 1 else "s")
        figures.append(KeyFigure("Wall time", duration(summary["wall_time"]), steps))
    figures.append(KeyFigure("Tokens", rounded(last.tokens), f"{last.tokens / last.step:,.0f} per step"))
    if "parameters_total" in summary:
        active = f"{rounded(summary['parameters_active'])} active" if "parameters_active" in summary else ""
        figures.append(KeyFigure("Parameters", rounded(summary["parameters_total"]), active))
    if "peak_memory" in summary:
        figures.append(KeyFigure("Peak memory", f"{summary['peak_memory']:.2f}", "GiB, resident"))
    return figures


def compression(metrics: RunMetrics, summary: Mapping[str, Any]) -> list[Bar]:
    """Bits per byte of the run next to those of general-purpose compressors."""
    own = _validation(metrics, summary, "val_bits_per_byte")
    if own is None or not np.isfinite(own):
        return []
    values = {"moeport": own, **summary.get("baselines", {})}
    largest = max(values.values())
    return [Bar(label, f"{value:.3f}", 100 * value / largest, label == "moeport") for label, value in values.items()]


def losses_by_domain(metrics: RunMetrics) -> list[Bar]:
    """The last validation loss on the text of each domain; empty without domains."""
    return _bars((metrics.last_evaluation and metrics.last_evaluation.val_loss_by_domain) or {})


def losses_by_objective(metrics: RunMetrics) -> list[Bar]:
    """The last validation loss of each denoiser; empty without a mixture."""
    return _bars((metrics.last_evaluation and metrics.last_evaluation.val_loss_by_objective) or {})


def objective_curves(metrics: RunMetrics) -> Drawn | None:
    """The training loss of each denoiser over the steps; None without a mixture."""
    axis = Axis("Training loss", "nats/target", "{:.4f}", smooth=True)
    chart = line_chart(axis, metrics.objective_series(), metrics.last.step)
    return Drawn("steps", chart) if chart else None


def _bars(losses: Mapping[str, float | None]) -> list[Bar]:
    known = {name: loss for name, loss in losses.items() if loss is not None and np.isfinite(loss)}
    return [Bar(name, f"{loss:.4f}", 100 * loss / max(known.values())) for name, loss in known.items()]


def comparison(metrics: RunMetrics, summary: Mapping[str, Any]) -> str:
    """A sentence that compares the run with each compressor."""
    own = _validation(metrics, summary, "val_bits_per_byte")
    if own is None or not np.isfinite(own):
        return ""
    parts = [
        f"{abs(1 - own / value):.1%} {'fewer' if own < value else 'more'} bits than {label}"
        for label, value in summary.get("baselines", {}).items()
    ]
    return ", ".join(parts)


def rounded(value: float) -> str:
    """A number with three digits and k, M or G."""
    return number(value, value / 100)
