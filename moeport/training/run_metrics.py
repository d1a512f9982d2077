"""The metrics of a whole run, reduced to the bounded size that a report can show."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moeport.errors import DataError, UserError
from moeport.pages.charts import Series
from moeport.pages.series import BinnedSeries
from moeport.training.metrics import iterate_metrics
from moeport.training.metrics_table import ROWS, EvaluationMetrics, Kind, Record, StepMetrics

CHART_POINTS = 400
HEAT_MAP_CELLS = 800_000
"""Maximum number of cells in all heat maps of a report together."""
LARGEST = 1e300
"""Values of this magnitude and above are drawn like infinities: not at all."""


def drawn(kind: Kind) -> list[str]:
    """Names of the metrics that the report draws over the steps."""
    return [name for name, row in ROWS[kind].items() if row.chart]


class RunMetrics:
    """The metrics of a run in a bounded number of points, however long it is.

    Args:
        points: the most points of a line.
        cells: the most cells in all heat maps together.
    """

    last: StepMetrics
    """The last step; there is none until one is added."""

    def __init__(self, points: int = CHART_POINTS, cells: int = HEAT_MAP_CELLS):
        self._points, self._cells = points, cells
        self._lines: dict[Kind, BinnedSeries] = {
            kind: BinnedSeries(1 + len(drawn(kind)), points) for kind in (StepMetrics, EvaluationMetrics)
        }
        self.last_evaluation: EvaluationMetrics | None = None
        self.num_steps = 0
        self.num_listed = 0
        """Steps whose lists are in the file."""
        self.loads: BinnedSeries | None = None
        """The step and all loads, flattened; None if the file has none."""
        self.num_experts = 0
        self.dropped_L, self.dropped_P = np.zeros(0), np.zeros(0)
        """Sums over those steps of the drop rate of each layer, and in each range of positions (empty without a
        capacity)."""
        self.exchanged_L2 = np.zeros((0, 2))
        """Sum over those steps of the bytes exchanged inside and between nodes."""
        self.objectives: dict[str, BinnedSeries] = {}
        """The step and the training loss of each denoiser; empty without a mixture."""
        self.capacity_L: list[int] = []
        """Expert capacities at the end; empty without a limit."""

    @classmethod
    def read(cls, path: Path) -> RunMetrics:
        """Those of a metrics.jsonl; UserError if it is missing or has no step, DataError if it is damaged."""
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected the metrics of a run folder")
        metrics = cls()
        for record in iterate_metrics(path):
            try:
                metrics.add(record)
            except ValueError as error:
                raise DataError(f"{path}: the record of step {record.step:,} does not fit: {error}") from None
        if not metrics.num_steps:
            raise UserError(f"{path}: has no step yet; expected the metrics of a run that has started training")
        return metrics

    def add(self, record: Record) -> None:
        """Add a record; they come in the order of the file. Raises ValueError for one of another model."""
        self._lines[type(record)].add(record.step, _values(record))
        if isinstance(record, EvaluationMetrics):
            self.last_evaluation = record
            return
        self.num_steps += 1
        self.last = record
        for name, loss in (record.loss_by_objective or {}).items():
            series = self.objectives.setdefault(name, BinnedSeries(2, self._points))
            series.add(record.step, np.array([record.step, np.nan if loss is None else loss]))
        if record.drop_rate_per_layer:
            self._add_layers(record)
        if record.expert_load:
            self._add_loads(record)

    def _add_layers(self, record: StepMetrics) -> None:
        if not self.num_listed:
            self.dropped_L = np.zeros(len(record.drop_rate_per_layer))
            self.dropped_P = np.zeros(len(record.drop_rate_by_position))
            self.exchanged_L2 = np.zeros((len(record.drop_rate_per_layer), 2))
        if record.exchanged_bytes_per_layer:
            self.exchanged_L2 += np.array(record.exchanged_bytes_per_layer, float)
        self.dropped_L += np.nan_to_num(np.array(record.drop_rate_per_layer, float))
        self.dropped_P += np.nan_to_num(np.array(record.drop_rate_by_position, float))
        self.capacity_L = record.capacity_per_layer
        self.num_listed += 1

    def _add_loads(self, record: StepMetrics) -> None:
        load_LE = np.array(record.expert_load, float)
        if not load_LE.size:
            return
        if self.loads is None:
            bins = self._cells // load_LE.size // 2 * 2
            self.loads = BinnedSeries(1 + load_LE.size, min(self._points, max(2, bins)))
            self.num_experts = load_LE.shape[1]
        self.loads.add(record.step, np.append(record.step, load_LE))

    def series(self, kind: Kind, name: str, label: str = "") -> Series:
        """A metric of the steps or the evaluations, as a line with a band from its minimum to its maximum."""
        lines, column = self._lines[kind], 1 + drawn(kind).index(name)
        mean_BV = lines.mean
        low_B, high_B = lines.low[:, column], lines.high[:, column]
        return Series(label, mean_BV[:, 0], mean_BV[:, column], _points(lines), low_B, high_B)

    def objective_series(self) -> list[Series]:
        """The training loss of each denoiser as a line over the steps."""
        return [
            Series(name, series.mean[:, 0], series.mean[:, 1], _points(series))
            for name, series in self.objectives.items()
        ]

    def load_points(self) -> list[str]:
        """A label with the steps of each point of `loads`."""
        return _points(self.loads) if self.loads else []


def _values(record: Record) -> np.ndarray:
    """The step, followed by the values to draw."""
    found = np.array([record.step, *(getattr(record, name) for name in drawn(type(record)))], float)
    return np.where(np.abs(found) < LARGEST, found, np.nan)


def _points(series: BinnedSeries) -> list[str]:
    """A label with the steps of each point; the first column is the step."""
    ranges = zip(series.low[:, 0], series.high[:, 0], strict=True)
    return [f"step {a:,.0f}" if a == b else f"steps {a:,.0f} to {b:,.0f}" for a, b in ranges]
