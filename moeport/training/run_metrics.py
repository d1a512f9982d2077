"""The metrics of a whole run in the bounded size that a report can show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moeport.errors import UserError
from moeport.pages.charts import Series
from moeport.pages.series import BinnedSeries
from moeport.training.metrics import EvaluationMetrics, StepMetrics, iterate_metrics

CHART_POINTS = 400
HEAT_MAP_CELLS = 800_000
"""Most cells of all heat maps of a report together."""

STEP_VALUES = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "load_balance",
    "router_z",
    "output_z",
    "imbalance",
    "drop_rate",
    "capacity",
    "inside_nodes_mb",
    "between_nodes_mb",
)
EVALUATION_VALUES = ("step", "val_loss", "val_bits_per_byte", "val_accuracy")


class RunMetrics:
    """The metrics of a run in a bounded number of points, however long it is.

    Args:
        path: the metrics.jsonl; UserError if it is missing or has no step.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected the metrics of a run folder")
        self.scalars = BinnedSeries(len(STEP_VALUES), CHART_POINTS)
        self.evaluations = BinnedSeries(len(EVALUATION_VALUES), CHART_POINTS)
        self.last_evaluation: EvaluationMetrics | None = None
        last: StepMetrics | None = None
        for record in iterate_metrics(path):
            if isinstance(record, EvaluationMetrics):
                self.evaluations.add(record.step, _values(record, EVALUATION_VALUES))
                self.last_evaluation = record
                continue
            load_LE = np.array(record.expert_load, float)
            if last is None:
                bins = HEAT_MAP_CELLS // load_LE.size // 2 * 2
                self.loads = BinnedSeries(1 + load_LE.size, min(CHART_POINTS, max(2, bins)))
                self.num_experts = load_LE.shape[1]
                self.dropped_L = np.zeros(len(load_LE))
                self.num_steps = 0
                self.dropped_P = np.zeros(len(record.drop_rate_by_position))
                """Sum over the steps of the drop rate in each range of positions; empty without a capacity."""
                self.exchanged_L2 = np.zeros((len(load_LE), 2))
                """Sum over the steps of the bytes exchanged inside and between nodes."""
            if record.exchanged_bytes_per_layer:
                self.exchanged_L2 += np.array(record.exchanged_bytes_per_layer, float)
            self.scalars.add(record.step, _values(record, STEP_VALUES))
            self.loads.add(record.step, np.append(record.step, load_LE))
            self.dropped_L += np.nan_to_num(np.array(record.drop_rate_per_layer, float))
            self.dropped_P += np.nan_to_num(np.array(record.drop_rate_by_position, float))
            self.num_steps += 1
            last = record
        if last is None:
            raise UserError(f"{path}: has no step yet; expected the metrics of a run that has begun to train")
        self.last = last

    def step_series(self, label: str, name: str) -> Series:
        """A value of the steps, as a line with the band of its extremes."""
        return _series(label, self.scalars, STEP_VALUES.index(name))

    def evaluation_series(self, label: str, name: str) -> Series:
        """A value of the evaluations."""
        return _series(label, self.evaluations, EVALUATION_VALUES.index(name))

    def load_points(self) -> list[str]:
        """The steps of each point of `loads` in words."""
        return _points(self.loads)


def _values(record: StepMetrics | EvaluationMetrics, names: Sequence[str]) -> np.ndarray:
    return np.array([getattr(record, name) for name in names], float)


def _points(series: BinnedSeries) -> list[str]:
    """The steps of each point in words; the first column is the step."""
    ranges = zip(series.low[:, 0], series.high[:, 0], strict=True)
    return [f"step {a:,.0f}" if a == b else f"steps {a:,.0f} to {b:,.0f}" for a, b in ranges]


def _series(label: str, series: BinnedSeries, column: int) -> Series:
    mean = series.mean
    return Series(label, mean[:, 0], mean[:, column], _points(series), series.low[:, column], series.high[:, column])
