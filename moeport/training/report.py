"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeport.config.schema import Config
from moeport.errors import MoeportError
from moeport.pages.charts import Axis, Bar, HeatMap, LineChart, Series, heat_map, line_chart, number
from moeport.pages.template import load_template
from moeport.training.duration import duration
from moeport.training.run_dir import CONFIG_FILE, METRICS_FILE, REPORT_FILE, SUMMARY_FILE, read_config
from moeport.training.run_metrics import RunMetrics


@dataclass(frozen=True)
class Figure:
    """A key figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class ExpertLoad:
    """Loads of the experts of one layer."""

    layer: str
    last: str
    """Least and most loaded expert at the end, in words."""
    map: HeatMap


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from the run's metrics, and from its config and summary if there are any.

    Returns: the report.

    Raises UserError if the run has no metrics.
    """
    run_dir = Path(run_dir)
    metrics = RunMetrics(run_dir / METRICS_FILE)
    config_file = run_dir / CONFIG_FILE
    summary = _summary(run_dir / SUMMARY_FILE)
    config = _config(run_dir)
    layers = _layer_names(config, len(metrics.dropped_L))
    unit = "nats/image" if config and config.data.is_images else "nats/token"
    page = load_template("report.html").render(
        name=run_dir.resolve().name,
        model=_model_words(config) if config else "",
        unfinished=_unfinished(metrics, config, summary),
        figures=_figures(metrics, summary, unit),
        compression=_compression(metrics, summary),
        comparison=_comparison(metrics, summary),
        sections=_sections(metrics, summary, unit),
        experts=_expert_loads(metrics, layers),
        load_points=metrics.load_points(),
        num_experts=metrics.num_experts,
        drops=_drops(metrics, layers),
        positions=_position_drops(metrics, config),
        exchanged=_exchanged(metrics, layers),
        sample=summary.get("sample"),
        config=config_file.read_text(encoding="utf-8") if config_file.is_file() else "",
        environment=_environment(summary),
    )
    path = run_dir / REPORT_FILE
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _config(run_dir: Path) -> Config | None:
    try:
        return read_config(run_dir)
    except MoeportError:
        return None


def _summary(path: Path) -> dict[str, Any]:
    """The known values of summary.json; empty if there is none."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: value for key, value in values.items() if value is not None}


def _layer_names(config: Config | None, num_layers: int) -> list[str]:
    """The layers that have experts, numbered as in the model; from 0 where the config does not say."""
    names = config.model.moe_layer_names if config else []
    return names if len(names) == num_layers else [f"Layer {layer}" for layer in range(num_layers)]


def _model_words(config: Config) -> str:
    model, moe = config.model, config.model.moe
    shared = f" + {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
    return (
        f"{model.num_layers} layers of width {model.d_model}, {moe.num_experts}{shared} experts of width "
        f"{moe.expert_hidden}, router {moe.router.name}, {moe.router.experts_per_token} of {moe.num_experts} "
        f"experts a token"
    )


def _unfinished(metrics: RunMetrics, config: Config | None, summary: Mapping[str, Any]) -> str:
    if summary:
        return ""
    total = f" of {config.training.steps:,}" if config else ""
    return f"This run is not finished: {metrics.last.step:,}{total} steps are done."


def _validation(metrics: RunMetrics, summary: Mapping[str, Any], name: str) -> float | None:
    """The summary's value, else that of the last evaluation, if any."""
    value = summary.get(name)
    return getattr(metrics.last_evaluation, name, None) if value is None else value


def _figures(metrics: RunMetrics, summary: Mapping[str, Any], unit: str) -> list[Figure]:
    last, figures = metrics.last, []
    validation_loss = _validation(metrics, summary, "val_loss")
    if validation_loss is not None:
        figures.append(Figure("Validation loss", f"{validation_loss:.4f}", unit))
    accuracy = _validation(metrics, summary, "val_accuracy")
    if accuracy is not None:
        figures.append(Figure("Validation accuracy", f"{accuracy:.2%}", "of held-out images"))
    figures.append(Figure("Last training loss", f"{last.loss:.4f}", unit))
    rate = summary.get("tokens_per_second") or np.nanmedian(metrics.step_series("", "tokens_per_second").y)
    figures.append(Figure("Throughput", f"{rate:,.0f}", "tokens/s"))
    mfu = metrics.step_series("", "mfu").y
    if np.isfinite(mfu).any():
        figures.append(Figure("MFU", f"{np.nanmedian(mfu):.1%}", "median"))
    if "wall_time" in summary:
        steps = f"{last.step:,} step" + ("" if last.step == 1 else "s")
        figures.append(Figure("Wall time", duration(summary["wall_time"]), steps))
    figures.append(Figure("Tokens", _rounded(last.tokens), f"{last.tokens / last.step:,.0f} a step"))
    if "parameters_total" in summary:
        active = f"{_rounded(summary['parameters_active'])} active" if "parameters_active" in summary else ""
        figures.append(Figure("Parameters", _rounded(summary["parameters_total"]), active))
    if "peak_memory" in summary:
        figures.append(Figure("Peak memory", f"{summary['peak_memory']:.2f}", "GiB, resident"))
    return figures


def _compression(metrics: RunMetrics, summary: Mapping[str, Any]) -> list[Bar]:
    """Bits per byte of the run beside general compressors."""
    own = _validation(metrics, summary, "val_bits_per_byte")
    if own is None or not np.isfinite(own):
        return []
    values = {"moeport": own, **summary.get("baselines", {})}
    largest = max(values.values())
    return [Bar(label, f"{value:.3f}", 100 * value / largest, label == "moeport") for label, value in values.items()]


def _comparison(metrics: RunMetrics, summary: Mapping[str, Any]) -> str:
    """The run against each compressor in words."""
    own = _validation(metrics, summary, "val_bits_per_byte")
    if own is None or not np.isfinite(own):
        return ""
    parts = [
        f"{abs(1 - own / value):.1%} {'fewer' if own < value else 'more'} bits than {label}"
        for label, value in summary.get("baselines", {}).items()
    ]
    return ", ".join(parts)


def _sections(metrics: RunMetrics, summary: Mapping[str, Any], unit: str) -> dict[str, list[LineChart]]:
    """The line charts by heading; losses that are not computed and drops that do not happen are left out."""
    step, evaluation, last_step = metrics.step_series, metrics.evaluation_series, metrics.last.step
    balanced = {"balanced": 1.0}
    nats = Axis("Loss", unit, "{:.4f}")
    bits = Axis("Validation bits per byte", "bits/byte", "{:.4f}", references=summary.get("baselines", {}))
    plans: dict[str, list[tuple[Axis, list[Series]]]] = {
        "Loss": [
            (nats, [step("training", "loss"), evaluation("validation", "val_loss")]),
            (bits, [evaluation("validation", "val_bits_per_byte")]),
            (Axis("Validation accuracy", "", "{:.2%}", percent=True), [evaluation("validation", "val_accuracy")]),
        ],
        "Optimisation": [
            (Axis("Learning rate", "", "{:.3e}", from_zero=True), [step("learning rate", "lr")]),
            (Axis("Gradient norm", "", "{:.3g}", logarithmic=True), [step("gradient norm", "grad_norm")]),
        ],
        "Speed": [
            (Axis("Throughput", "tokens/s", "{:,.0f}", from_zero=True), [step("tokens/s", "tokens_per_second")]),
            (Axis("Model FLOP utilisation", "", "{:.1%}", percent=True, from_zero=True), [step("MFU", "mfu")]),
        ],
        "Routing": [
            (Axis("Expert imbalance", "largest / mean load", "{:.3f}", references=balanced), [step("", "imbalance")]),
        ],
    }
    dropped = Axis("Drop rate", "of assignments", "{:.2%}", percent=True, from_zero=True)
    for heading, axis, name in (
        ("Routing", Axis("Load-balancing loss", "", "{:.4f}", references=balanced), "load_balance"),
        ("Routing", Axis("Router z-loss", "", "{:.4g}"), "router_z"),
        ("Routing", dropped, "drop_rate"),
        ("Routing", Axis("Expert capacity", "assignments, mean of the layers", "{:,.0f}", from_zero=True), "capacity"),
        ("Speed", Axis("All-to-all inside nodes", "MB/step", "{:,.3g}", from_zero=True), "inside_nodes_mb"),
        ("Speed", Axis("All-to-all between nodes", "MB/step", "{:,.3g}", from_zero=True), "between_nodes_mb"),
        ("Loss", Axis("Output z-loss", "", "{:.4g}"), "output_z"),
    ):
        series = step("", name)
        if np.any(np.nan_to_num(series.y)):
            plans[heading].append((axis, [series]))
    return {
        heading: [chart for axis, series in charts if (chart := line_chart(axis, series, last_step))]
        for heading, charts in plans.items()
    }


def _expert_loads(metrics: RunMetrics, layers: Sequence[str]) -> list[ExpertLoad]:
    share_BLE = metrics.loads.mean[:, 1:].reshape(-1, len(layers), metrics.num_experts)
    ratio_LEB = share_BLE.transpose(1, 2, 0) * metrics.num_experts
    return [
        ExpertLoad(
            layer,
            f"{np.nanmin(ratio_EB[:, -1]):.2f} to {np.nanmax(ratio_EB[:, -1]):.2f} at the end",
            heat_map(ratio_EB, metrics.last.step),
        )
        for layer, ratio_EB in zip(layers, ratio_LEB, strict=True)
    ]


def _drops(metrics: RunMetrics, layers: Sequence[str]) -> list[Bar]:
    """Mean drop rate of each layer; empty if nothing was dropped."""
    mean_L = metrics.dropped_L / metrics.num_steps
    largest = mean_L.max()
    if largest == 0:
        return []
    limits = [f", capacity {rows:,} at the end" for rows in metrics.last.capacity_per_layer] or [""] * len(layers)
    return [
        Bar(layer + limit, f"{mean:.2%}", 100 * mean / largest)
        for layer, limit, mean in zip(layers, limits, mean_L, strict=True)
    ]


def _position_drops(metrics: RunMetrics, config: Config | None) -> list[Bar]:
    """Mean drop rate in each range of positions of a sequence; empty if nothing was dropped."""
    mean_P = metrics.dropped_P / metrics.num_steps
    if not mean_P.any():
        return []
    length = config.data.tokens_per_sequence if config else len(mean_P)
    first = [-(-number * length // len(mean_P)) for number in range(len(mean_P) + 1)]
    return [
        Bar(f"{start} to {end - 1}", f"{mean:.2%}", 100 * mean / mean_P.max())
        for start, end, mean in zip(first, first[1:], mean_P, strict=False)
    ]


def _exchanged(metrics: RunMetrics, layers: Sequence[str]) -> list[Bar]:
    """Mean bytes a step of the all-to-all of each layer; empty where ranks do not share the experts."""
    mean_L2 = metrics.exchanged_L2 / metrics.num_steps / 1e6
    if not mean_L2.any():
        return []
    return [
        Bar(
            layer,
            f"{inside + between:,.3g} MB, {between:,.3g} MB of it between nodes",
            100 * (inside + between) / mean_L2.sum(1).max(),
        )
        for layer, (inside, between) in zip(layers, mean_L2, strict=True)
    ]


def _environment(summary: Mapping[str, Any]) -> dict[str, str]:
    flops = summary.get("training_flops_per_token")
    values = {
        "device": summary.get("device"),
        "compute type": summary.get("dtype"),
        "training FLOP a token": flops and _rounded(flops),
        "checkpoint": summary.get("checkpoint"),
        "git revision": summary.get("git_revision"),
        **summary.get("versions", {}),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _rounded(value: float) -> str:
    return number(value, value / 100)
