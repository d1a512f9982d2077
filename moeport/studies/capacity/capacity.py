"""The expert capacity that a run needs, from its measured loads and cosines: drop rates and bounds by capacity."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeport.config.schema import Config
from moeport.errors import UserError
from moeport.studies.capacity.measure import Measurement, measure_cosines
from moeport.training.metrics import StepMetrics, iterate_metrics
from moeport.training.run_dir import CONFIG_FILE, METRICS_FILE, read_config

CURVE_POINTS = 200


@dataclass(frozen=True)
class Loads:
    """Assignments to the experts of one layer, before drops."""

    rows_SE: np.ndarray
    """Assignments of each expert per micro-batch, mean over the micro-batches of each step."""
    choices: float
    """T K / E of a micro-batch, which a capacity factor multiplies; above the mean if some choices are unrouted."""

    @property
    def mean(self) -> float:
        """Mean assignments per expert in a micro-batch."""
        return float(self.rows_SE.mean())

    def drop_rate(self, capacity: int) -> float:
        """Share of the assignments that are dropped if each expert takes at most `capacity` per micro-batch."""
        total = self.rows_SE.sum()
        return float(np.maximum(self.rows_SE - capacity, 0).sum() / total) if total else 0.0

    def capacity_for(self, drop_rate: float) -> int:
        """The smallest capacity, at least 1, with at most this drop rate."""
        low, high = 1, max(1, math.ceil(self.rows_SE.max()))
        while low < high:
            middle = (low + high) // 2
            if self.drop_rate(middle) <= drop_rate:
                high = middle
            else:
                low = middle + 1
        return low

    def curve(self) -> tuple[list[int], list[float]]:
        """Capacities from 0 to the smallest that drops nothing, with their drop rates."""
        last = max(1, math.ceil(self.rows_SE.max()))
        capacities = sorted({round(x) for x in np.linspace(0, last, min(last, CURVE_POINTS) + 1)})
        return capacities, [self.drop_rate(capacity) for capacity in capacities]


@dataclass(frozen=True)
class LayerCapacity:
    """One mixture-of-experts layer."""

    name: str
    """The layer's label."""
    loads: Loads
    present: int | None
    """Capacity in the last step; None without a limit."""
    drop_rate: float
    """Actual drop rate, mean over the analysed steps."""
    measured: Measurement
    """Measured on the last checkpoint; empty if that was impossible."""


@dataclass(frozen=True)
class RunCapacity:
    """The result of `moeport capacity`."""

    run_dir: Path
    config: Config
    first_step: int
    last_step: int
    """First and last of the analysed steps."""
    micro_batches: int
    """Micro-batches per step, counting each pass; a capacity applies to each of them separately."""
    layers: list[LayerCapacity]
    notes: list[str]
    """What was assumed, and what could not be measured and why."""


def run_capacity(run_dir: Path, last_steps: int = 100, report: Callable[[str], None] = lambda _: None) -> RunCapacity:
    """Read the loads of a finished or running run, and measure cosines on its last checkpoint.

    Args:
        run_dir: the run folder.
        last_steps: how many of the last steps to analyse.
        report: is given a sentence on what is being done.

    Raises UserError if it is not a run folder or has no step yet.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    steps = _last_steps(run_dir / METRICS_FILE, last_steps)
    _check_fits(run_dir, config, steps)
    router = config.model.moe.router
    micro_batches = config.training.gradient_accumulation * router.passes
    notes = []
    if micro_batches > 1:
        notes.append(
            f"The metrics hold the loads of whole steps; each of the {micro_batches} micro-batches is assumed to have "
            "an equal share of an expert's load. If the shares differ, more is dropped than is shown here."
        )
    if steps[-1].capacity_per_layer:
        notes.append("The loads are those of a run with a capacity. Another capacity would have changed the training.")
    if not steps[0].assignments_per_layer:
        notes.append("These metrics were written by an older moeport: every token is assumed to have K assignments.")
    measured, note = measure_cosines(run_dir, config, report)
    notes += [note] if note else []
    present = steps[-1].capacity_per_layer
    choices = _assignments(steps[-1], config) / config.model.moe.num_experts / micro_batches
    layers = [
        LayerCapacity(
            name,
            Loads(np.array([_rows(step, layer, config) for step in steps]) / micro_batches, choices),
            present[layer] if present else None,
            float(np.mean(np.nan_to_num([step.drop_rate_per_layer[layer] for step in steps]))),
            measured.get(name, Measurement({}, {})),
        )
        for layer, name in enumerate(config.model.moe_layer_names)
    ]
    return RunCapacity(run_dir, config, steps[0].step, steps[-1].step, micro_batches, layers, notes)


def check_layer(run_dir: Path, block: int) -> None:
    """Raises UserError if a block of a run has no experts, or it is not a run folder."""
    known = read_config(run_dir).model.moe_layers
    if block not in known:
        raise UserError(
            f"--layer {block}: no such layer with experts in {run_dir}; expected one of {', '.join(map(str, known))}"
        )


def select_layer(capacity: RunCapacity, block: int) -> list[LayerCapacity]:
    """The layers of one block, which has experts."""
    model = capacity.config.model
    each = model.moe.router.sub_layers
    first = model.moe_layers.index(block) * each
    return capacity.layers[first : first + each]


def as_json(capacity: RunCapacity, layers: list[LayerCapacity], target: float) -> dict[str, Any]:
    """The whole result for JSON; an infinite bound becomes null."""
    return {
        "run_dir": str(capacity.run_dir),
        "first_step": capacity.first_step,
        "last_step": capacity.last_step,
        "micro_batches": capacity.micro_batches,
        "target_drop_rate": target,
        "notes": capacity.notes,
        "layers": [_layer_json(layer, target) for layer in layers],
    }


def _layer_json(layer: LayerCapacity, target: float) -> dict[str, Any]:
    loads, wanted = layer.loads, layer.loads.capacity_for(target)
    capacities, drop_rates = loads.curve()
    quantiles = (0, 0.25, 0.5, 0.75, 1)
    return {
        "layer": layer.name,
        "present": {"capacity": layer.present, "drop_rate": layer.drop_rate},
        "recommended": {
            "capacity": wanted,
            "factor": wanted / loads.choices,
            "drop_rate": loads.drop_rate(wanted),
        },
        "load": {
            "choices": loads.choices,
            "mean": loads.mean,
            "quantiles": {str(q): float(np.quantile(loads.rows_SE, q)) for q in quantiles},
            "by_expert": loads.rows_SE.mean(0).tolist(),
        },
        "drop_curve": {"capacity": capacities, "drop_rate": drop_rates},
        "estimates": {
            key: {"delta": e.delta, "kept": e.kept, "competitors": e.rivals}
            for key, e in layer.measured.estimates.items()
        },
        "bounds": {
            key: {form: rows if math.isfinite(rows) else None for form, rows in bounds.items()}
            for key, bounds in layer.measured.bounds.items()
        },
    }


def _last_steps(path: Path, count: int) -> list[StepMetrics]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the metrics of a run folder")
    found = (record for record in iterate_metrics(path) if isinstance(record, StepMetrics) and record.expert_load)
    steps = deque(found, maxlen=count)
    if not steps:
        raise UserError(f"{path}: has no step yet; expected the metrics of a run that has started training")
    return list(steps)


def _check_fits(run_dir: Path, config: Config, steps: list[StepMetrics]) -> None:
    """Raises UserError if the metrics are of another model than that of the config."""
    wanted = len(config.model.moe_layer_names)
    for step in steps:
        if len(step.expert_load) != wanted:
            raise UserError(
                f"{run_dir / CONFIG_FILE}: does not describe the run of {METRICS_FILE}: it has {wanted} layers with "
                f"experts, step {step.step} has {len(step.expert_load)}; restore it, or repeat the run with --resume"
            )


def _rows(step: StepMetrics, layer: int, config: Config) -> np.ndarray:
    """Assignments of each expert in a whole step, rounded to integers, since shares have only six digits."""
    total = step.assignments_per_layer[layer] if step.assignments_per_layer else _assignments(step, config)
    return np.round(np.nan_to_num(np.array(step.expert_load[layer], float)) * total)


def _assignments(step: StepMetrics, config: Config) -> int:
    """T K of a step, counting every pass."""
    router = config.model.moe.router
    return round(step.tokens / config.training.updates(step.step)) * router.passes * router.experts_per_token
