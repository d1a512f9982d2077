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
from moeport.studies.compare.cost import Cost
from moeport.training.metrics import EvaluationMetrics, StepMetrics, iterate_metrics
from moeport.training.run_dir import METRICS_FILE
from moeport.training.side_files import read_summary
from moeport.training.starts import read_starts

CHART_POINTS = 100
CURVES = ("drop_rate", "imbalance", "rows_mean", "rows_max", "local_share")
"""Names of the metrics of steps that are drawn over the steps."""
LOSSES = {"val_loss": "step", "loss_over_rows": "rows", "loss_over_flops": "flops", "loss_over_time": "seconds"}
"""Names of the curves of the validation loss, and what they are drawn over."""
ITEM_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
ALL_TO_ALL = (
    "rows per token x (1 - 1/N) x d_model x bytes of the compute type x 2 (there and back) x 2 (forward and backward)"
)
"""How the bytes of the all-to-all are computed."""


@dataclass(frozen=True)
class Figures:
    """The numbers of one run that the table shows.

    Drop rate, imbalance, local share and rows are means over the second half of the steps, when routing has settled.
    """

    parameters_total: int
    """Number of trained parameters."""
    val_loss: float
    """Validation loss after the last step in nats per token, or per image."""
    val_bits_per_byte: float | None
    """The same loss in bits per byte of text; None for images."""
    val_accuracy: float | None
    """Share of the held-out images that are classified correctly; None for text."""
    val_loss_by_frequency: Mapping[str, float]
    """Validation loss on rare and on frequent ids; empty for images and for runs of older versions."""
    val_loss_by_domain: Mapping[str, float]
    """Validation loss on each domain; empty without `data.domains`."""
    val_loss_by_objective: Mapping[str, float]
    """Validation loss of each denoiser; empty without a mixture of them."""
    drop_rate: float
    """Share of the chosen assignments that were dropped."""
    imbalance: float
    """Largest expert load divided by the mean load, before drops, mean over the layers."""
    local_share: float | None
    """Share of the choices that fall on the own node, mean over the layers; None without several nodes."""
    rows_per_token: float
    """Rows that the experts compute per token, over all layers."""
    rows_total: float
    """Rows that the experts have computed in all steps, over all layers."""
    parameters_active: float
    """Parameters that a token uses on average, by the rows that were computed."""
    expert_flops_per_token: float
    """FLOPs per token of the rows of routed experts and of shared experts, forward and backward."""
    flops_per_token: float
    """FLOPs per token of the whole model, forward and backward, by the rows that were computed."""
    flops_total: float
    """FLOPs of all steps, by the rows that were computed."""
    rows_mean: float
    """Rows that an expert computes per step, mean over experts and layers."""
    rows_max: float
    """Rows per step of the busiest expert of each layer, mean over the layers."""
    step_time: float
    """Seconds per step, median over all steps."""
    train_time: float
    """Seconds of all steps together, without evaluations and checkpoints."""
    all_to_all_bytes: float
    """Bytes per token that leave its rank in all layers of a step, computed by `all_to_all_bytes`."""
    wall_time: float
    """Duration of the whole run in seconds."""

    def values(self) -> dict[str, float | None]:
        """All figures by name; losses by frequency, by domain and by denoiser as `val_loss.rare`, `val_loss.NAME`."""
        kinds = (self.val_loss_by_frequency, self.val_loss_by_domain, self.val_loss_by_objective)
        parts = {f"val_loss.{name}": x for kind in kinds for name, x in kind.items()}
        return {name: value for name, value in vars(self).items() if not isinstance(value, Mapping)} | parts


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    figures: Figures
    curves: Mapping[str, Series]
    """Curves by the names in LOSSES and CURVES."""
    device: str
    """Description of the device."""
    dtype: str
    """Compute type."""
    versions: Mapping[str, str]
    """Versions of Python, moeport and the framework."""
    trained_on: str
    """The numbers of ranks that have trained it, such as `2` or `1, 2`; empty if they are not known."""


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
    cost = Cost.of(config.model, summary.training_flops_per_token, summary.parameters_active)
    read = _Reading(run_dir, config, cost)
    for record in iterate_metrics(run_dir / METRICS_FILE):
        if isinstance(record, EvaluationMetrics):
            read.evaluation(record)
        else:
            read.step(record)
    settled = read.settled()
    figures = Figures(
        parameters_total=summary.parameters_total,
        val_loss=summary.val_loss,
        val_bits_per_byte=summary.val_bits_per_byte,
        val_accuracy=summary.val_accuracy,
        val_loss_by_frequency=(read.last and read.last.val_loss_by_frequency) or {},
        val_loss_by_domain=(read.last and read.last.val_loss_by_domain) or {},
        val_loss_by_objective=(read.last and read.last.val_loss_by_objective) or {},
        drop_rate=settled["drop_rate"],
        imbalance=settled["imbalance"],
        local_share=None if np.isnan(settled["local_share"]) else settled["local_share"],
        rows_per_token=settled["rows_per_token"],
        rows_total=read.rows,
        parameters_active=cost.active_parameters(settled["rows_per_token"]),
        expert_flops_per_token=cost.experts(settled["rows_per_token"]),
        flops_per_token=cost.per_token(settled["rows_per_token"]),
        flops_total=read.flops,
        rows_mean=settled["rows_mean"],
        rows_max=settled["rows_max"],
        step_time=float(np.median(read.times)),
        train_time=float(np.sum(read.times)),
        all_to_all_bytes=all_to_all_bytes(settled["rows_per_token"], config.model.d_model, summary.dtype, ranks),
        wall_time=summary.wall_time,
    )
    trained_on = ", ".join(dict.fromkeys(str(start.ranks) for start in read_starts(run_dir)))
    return RunResult(figures, read.curves(), summary.device, summary.dtype, summary.versions, trained_on)


class _Reading:
    """What the records of a run add up to.

    Args:
        run_dir: the folder of the run, for messages.
        config: that of the run.
        cost: that of its tokens and rows.
    """

    def __init__(self, run_dir: Path, config: Config, cost: Cost):
        self.run_dir, self.config, self.cost = run_dir, config, cost
        self.times: list[float] = []
        self.rows = 0.0
        """Rows computed so far."""
        self.tokens = 0
        """Tokens trained on so far."""
        self.seconds = 0.0
        """Seconds of the steps so far."""
        self.last: EvaluationMetrics | None = None
        self._steps = BinnedSeries(1 + len(CURVES), CHART_POINTS)
        self._evaluations = BinnedSeries(1 + len(LOSSES), CHART_POINTS)
        self._settled: list[list[float]] = []
        self._rows_of_step = 0.0

    def evaluation(self, record: EvaluationMetrics) -> None:
        """Add an evaluation. That at the former end of a run that became longer is in no curve."""
        self.last, training = record, self.config.training
        if record.step != training.steps and record.step % (training.evaluation_interval or training.steps):
            return
        values = [record.val_loss, record.step, self.rows, self.flops, self.seconds]
        self._evaluations.add(record.step, np.array(values))

    def step(self, record: StepMetrics) -> None:
        """Add a step. Of a long run, the loads of some steps are left out."""
        self.times.append(record.step_time)
        self.seconds += record.step_time
        if record.expert_load:
            self._loads(record)
        self._rows_of_step = record.rows_computed or self._rows_of_step
        self.rows += self._rows_of_step
        self.tokens = record.tokens

    @property
    def flops(self) -> float:
        """FLOPs of the steps so far."""
        return self.cost.total(self.tokens, self.rows)

    def _loads(self, record: StepMetrics) -> None:
        if not record.assignments_per_layer:
            raise DataError(
                f"{self.run_dir}: trained by an older moeport, which did not count rows; delete it and repeat the "
                "command"
            )
        training = self.config.training
        rows_LE = _rows(record, training.gradient_accumulation)
        served_L = 1 - np.array(record.drop_rate_per_layer) + record.fill_rate
        self._rows_of_step = record.rows_computed or float(np.dot(record.assignments_per_layer, served_L))
        local = np.nan if record.local_share is None else record.local_share
        rows_mean, rows_max = self._rows_of_step / rows_LE.size, float(rows_LE.max(1).mean())
        values = [record.drop_rate, record.imbalance, rows_mean, rows_max, local]
        self._steps.add(record.step, np.array([record.step, *values]))
        if 2 * record.step > training.steps:
            tokens = record.tokens / training.updates(record.step)
            self._settled.append([*values, self._rows_of_step / tokens])

    def settled(self) -> dict[str, float]:
        """Means over the second half of the steps, by the names in CURVES and `rows_per_token`."""
        if not self._settled:
            raise DataError(
                f"{self.run_dir}: the metrics of its second half are lost; delete it and repeat the command"
            )
        means = np.mean(self._settled, axis=0).tolist()
        return dict(zip((*CURVES, "rows_per_token"), means, strict=True))

    def curves(self) -> dict[str, Series]:
        """By the names in LOSSES and CURVES."""
        found = {name: _series(self._steps, 0, column, 0) for column, name in enumerate(CURVES, 1)}
        return found | {name: _series(self._evaluations, column, 0, 1) for column, name in enumerate(LOSSES, 1)}


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
    """The mean over seeds, with a band from the minimum to the maximum if there are several.

    A point that a seed lacks, since its record is lost, is left out.
    """
    points = [point for point in curves[0].points if all(point in curve.points for curve in curves)]
    places = [[curve.points.index(point) for point in points] for curve in curves]
    x, y = (
        np.stack([getattr(curve, axis)[place] for curve, place in zip(curves, places, strict=True)]) for axis in "xy"
    )
    low, high = (y.min(0), y.max(0)) if len(curves) > 1 else (None, None)
    return Series(label, x.mean(0), y.mean(0), points, low, high)


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


def _series(series: BinnedSeries, x: int, y: int, step: int) -> Series:
    """Column y of a series over column x; `step` is the column with the steps, which name the points."""
    mean = series.mean
    ranges = zip(series.low[:, step], series.high[:, step], strict=True)
    points = [f"step {a:,.0f}" if a == b else f"steps {a:,.0f} to {b:,.0f}" for a, b in ranges]
    return Series("", mean[:, x], mean[:, y], points)
