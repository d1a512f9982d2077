"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeport.config.schema import Config
from moeport.errors import MoeportError
from moeport.files import write_text
from moeport.pages.lines import colours
from moeport.pages.template import load_template
from moeport.reading import read_json
from moeport.training.profile_table import ProfileCharts, charts
from moeport.training.report_charts import sections
from moeport.training.report_figures import (
    comparison,
    compression,
    key_figures,
    losses_by_domain,
    losses_by_objective,
    objective_curves,
    rounded,
)
from moeport.training.report_layers import drops, exchanged, expert_loads, layer_names, position_drops
from moeport.training.report_routing import routing
from moeport.training.run_dir import (
    CONFIG_FILE,
    METRICS_FILE,
    PROFILE_DIR,
    PROFILE_FILE,
    REPORT_FILE,
    ROUTING_FILE,
    SUMMARY_FILE,
    read_config,
)
from moeport.training.run_metrics import RunMetrics
from moeport.training.side_files import is_of_its_type
from moeport.training.starts import Start, read_starts


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write a report from a run's metrics, and from its config and summary if there are any; also while it trains.

    Args:
        run_dir: the run folder.
        path: where to write it; default report.html in the run folder.

    Returns: the report.

    Raises UserError if the run has no metrics, WriteError if the report cannot be written.
    """
    run_dir = Path(run_dir)
    metrics = RunMetrics.read(run_dir / METRICS_FILE)
    config_file = run_dir / CONFIG_FILE
    summary = _summary(run_dir / SUMMARY_FILE)
    config = _config(run_dir)
    layers = layer_names(config, len(metrics.dropped_L))
    starts = read_starts(run_dir)
    resumed = [start.step for start in starts if 0 < start.step <= metrics.last.step]
    unit = "nats/image" if config and config.data.is_images else "nats/token"
    page = load_template("report.html").render(
        name=run_dir.resolve().name,
        model=describe_model(config) if config else "",
        unfinished=_unfinished(metrics, config, summary),
        figures=key_figures(metrics, summary, unit),
        compression=compression(metrics, summary),
        comparison=comparison(metrics, summary),
        domains=losses_by_domain(metrics),
        objectives=losses_by_objective(metrics),
        objective_curves=objective_curves(metrics),
        objective_colours=colours([*metrics.objectives]),
        sections=sections(metrics, config, summary.get("baselines", {}), unit, resumed),
        experts=expert_loads(metrics, layers),
        load_points=metrics.load_points(),
        num_experts=metrics.num_experts,
        drops=drops(metrics, layers),
        positions=position_drops(metrics, config),
        exchanged=exchanged(metrics, layers),
        routing=routing(run_dir / ROUTING_FILE, layers, metrics.last.step),
        profile=_profile(run_dir / PROFILE_DIR / PROFILE_FILE),
        sample=summary.get("sample"),
        config=config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else "",
        environment=_environment(summary, starts),
    )
    path = path or run_dir / REPORT_FILE
    write_text(path, page)
    return path


def _config(run_dir: Path) -> Config | None:
    try:
        return read_config(run_dir)
    except MoeportError:
        return None


def _profile(path: Path) -> ProfileCharts | None:
    """What the profile of a run found; None if there is none, or none that can be read."""
    try:
        return charts(read_json(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return None


def _summary(path: Path) -> dict[str, Any]:
    """The known values of summary.json that are of their type; empty if there is none, or none that can be read."""
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if value is not None and is_of_its_type(name, value)}


def describe_model(config: Config) -> str:
    """A sentence about the model."""
    model, moe = config.model, config.model.moe
    shared = f" + {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
    return (
        f"{model.num_layers} layers of width {model.d_model}, {moe.num_experts}{shared} experts of width "
        f"{moe.expert_hidden}, router {moe.router.name}, {moe.router.experts_per_token} of {moe.num_experts} "
        f"experts per token"
    )


def _unfinished(metrics: RunMetrics, config: Config | None, summary: Mapping[str, Any]) -> str:
    if summary:
        return ""
    total = f" of {config.training.steps:,}" if config else ""
    return f"This run is not finished: {metrics.last.step:,}{total} steps are done."


def _environment(summary: Mapping[str, Any], starts: Sequence[Start]) -> dict[str, str]:
    flops = summary.get("training_flops_per_token")
    values = {
        "started": starts[0].time + " UTC" if starts else None,
        "resumed": ", ".join(f"{start.time} UTC after step {start.step:,}" for start in starts[1:]) or None,
        "command": starts[-1].command if starts else None,
        "host": starts[-1].host if starts else None,
        "ranks": starts[-1].ranks if starts else None,
        "data": starts[-1].data if starts else None,
        "commit": starts[-1].commit or None if starts else None,
        "device": summary.get("device"),
        "compute type": summary.get("dtype"),
        "training FLOP per token": flops and rounded(flops),
        "files and rows skipped": summary.get("skipped") or None,
        "checkpoint": summary.get("checkpoint"),
        **summary.get("versions", {}),
    }
    return {name: str(value) for name, value in values.items() if value is not None}
