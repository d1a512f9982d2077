"""The figures that a comparison reads from a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeport.config.schema import Config
from moeport.errors import DataError
from moeport.pages.charts import Series
from moeport.pages.series import BinnedSeries
from moeport.training.metrics import EvaluationMetrics, StepMetrics, iterate_metrics
from moeport.training.run_dir import METRICS_FILE
from moeport.training.side_files import read_summary

CHART_POINTS = 100
CURVES = ("val_loss", "drop_rate", "imbalance", "rows_mean", "rows_max")
"""Names of the metrics drawn over the steps."""
ITEM_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
ALL_TO_ALL = (
    "rows per token x (1 - 1/N) x d_model x bytes of the compute type x 2 (there and back) x 2 (forward and backward)"
)
"""How the bytes of the all-to-all are computed."""


@dataclass(frozen=True)
class Figures:
    """The numbers of one run that the table shows.

    Drop rate, imbalance and rows are means over the second half of the steps, when routing has settled.
    """

    parameters_total: int
    """Number of trained parameters."""
    parameters_active: int
    """Number of parameters that one token uses."""
    val_loss: float
    """Validation loss after the last step in nats per token, or per image."""
    val_bits_per_byte: float | None
    """The same loss in bits per byte of text; None for images."""
    val_accuracy: float | None
    """Share of the held-out images that are classified correctly; None for text."""
    drop_rate: float
    """Share of the chosen assignments that were dropped."""
    imbalance: float
    """Largest expert load divided by the mean load, before drops, mean over the layers."""
    rows_per_token: float
    """Rows that the experts compute per token, over all layers."""
    rows_mean: float
    """Rows that an expert computes per step, mean over experts and layers."""
    rows_max: float
    """Rows per step of the busiest expert of each layer, mean over the layers."""
    step_time: float
    """Seconds per step, median over all steps."""
    all_to_all_bytes: float
    """Bytes per token that leave its rank in all layers of a step, computed by `all_to_all_bytes`."""
    wall_time: float
    """Duration of the whole run in seconds."""


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    figures: Figures
    curves: Mapping[str, Series]
    """Curves by the names in CURVES."""
    device: str
    """Description of the device."""
    dtype: str
    """Compute type."""
    versions: Mapping[str, str]
    """Versions of Python, moeport and the framework."""


def is_finished(run_dir: Path, steps: int) -> bool:
    """Whether a run folder holds a run that has done this many steps, and its summary is whole."""
    try:
        return read_summary(run_dir).steps == steps
    except DataError:
        return False


def read_result(run_dir: Path, config: Config, ranks: int) -> RunResult:
    """Read a finished run.

    Args:
        run_dir: its folder.
        config: the config it was trained with.
        ranks: N, the number of ranks that the experts are assumed to be spread over.

    Raises DataError if its metrics cannot be read.
    """
    summary = read_summary(run_dir)
    steps, evaluations = BinnedSeries(5, CHART_POINTS), BinnedSeries(2, CHART_POINTS)
    settled, times, rows_per_token = [], [], []
    for record in iterate_metrics(run_dir / METRICS_FILE):
        if isinstance(record, EvaluationMetrics):
            evaluations.add(record.step, np.array([record.step, record.val_loss]))
            continue
        times.append(record.step_time)
        if not record.expert_load:  # of a long run, some steps' loads are left out
            continue
        if not record.assignments_per_layer:
            raise DataError(
                f"{run_dir}: trained by an older moeport, which did not count rows; delete it and repeat the command"
            )
        rows_LE = _rows(record, config.training.gradient_accumulation)
        computed = np.dot(record.assignments_per_layer, 1 - np.array(record.drop_rate_per_layer) + record.fill_rate)
        values = np.array([record.drop_rate, record.imbalance, computed / rows_LE.size, rows_LE.max(1).mean()])
        steps.add(record.step, np.append(record.step, values))
        if 2 * record.step > config.training.steps:
            settled.append(values)
            rows_per_token.append(computed / (record.tokens / config.training.updates(record.step)))
    if not settled:
        raise DataError(f"{run_dir}: the metrics of its second half are lost; delete it and repeat the command")
    drop_rate, imbalance, rows_mean, rows_max = np.mean(settled, axis=0).tolist()
    dtype = summary.dtype
    per_token = float(np.mean(rows_per_token))
    bytes_per_token = all_to_all_bytes(per_token, config.model.d_model, dtype, ranks)
    curves = {"val_loss": _series(evaluations, 1)}
    curves |= {name: _series(steps, column) for column, name in enumerate(CURVES[1:], 1)}
    figures = Figures(
        parameters_total=summary.parameters_total,
        parameters_active=summary.parameters_active,
        val_loss=summary.val_loss,
        val_bits_per_byte=summary.val_bits_per_byte,
        val_accuracy=summary.val_accuracy,
        drop_rate=drop_rate,
        imbalance=imbalance,
        rows_per_token=per_token,
        rows_mean=rows_mean,
        rows_max=rows_max,
        step_time=float(np.median(times)),
        all_to_all_bytes=bytes_per_token,
        wall_time=summary.wall_time,
    )
    return RunResult(figures, curves, summary.device, dtype, summary.versions)


def all_to_all_bytes(rows_per_token: float, d_model: int, dtype: str, ranks: int) -> float:
    """Bytes per token that leave its rank in one step, if experts and tokens are spread evenly over the ranks.

    Args:
        rows_per_token: rows that experts compute per token, in all layers together.
        d_model: width D of a row.
        dtype: compute type, in which rows are sent.
        ranks: N; a row stays where it is with probability 1 / N.

    Returns: bytes, as in ALL_TO_ALL.
    """
    return rows_per_token * (1 - 1 / ranks) * d_model * ITEM_BYTES[dtype] * 2 * 2


def mean_curve(curves: Sequence[Series], label: str) -> Series:
    """The mean over seeds, with a band from the minimum to the maximum if there are several."""
    y = np.stack([curve.y for curve in curves])
    low, high = (y.min(0), y.max(0)) if len(curves) > 1 else (None, None)
    return Series(label, curves[0].x, y.mean(0), curves[0].points, low, high)


def _rows(record: StepMetrics, micro_batches: int) -> np.ndarray:
    """Rows that each expert computed in a step (L, E).

    An expert computes the assignments to it, up to its capacity in each micro-batch. The metrics hold only the load of
    the whole step, so with a capacity and several micro-batches the result is an upper bound. With policy `round` it is
    the load, from which an expert's rows differ by at most half a tile in each micro-batch.
    """
    chosen_LE = np.array(record.expert_load) * np.array(record.assignments_per_layer)[:, None]
    if not record.capacity_per_layer:
        return chosen_LE
    capacity_L = np.array(record.capacity_per_layer) * micro_batches
    return np.minimum(chosen_LE, np.where(capacity_L > 0, capacity_L, np.inf)[:, None])


def _series(series: BinnedSeries, column: int) -> Series:
    mean = series.mean
    ranges = zip(series.low[:, 0], series.high[:, 0], strict=True)
    points = [f"step {a:,.0f}" if a == b else f"steps {a:,.0f} to {b:,.0f}" for a, b in ranges]
    return Series("", mean[:, 0], mean[:, column], points)
