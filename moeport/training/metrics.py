"""The numbers of a run: one JSON line for each step and each evaluation in metrics.jsonl."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from moeport.errors import DataError
from moeport.training.run_dir import METRICS_FILE
from moeport.training.tensorboard import EventLog

logger = logging.getLogger(__name__)

TENSORBOARD_DIR = "tensorboard"


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step. A NaN or infinity is null in the file and NaN when read back."""

    step: int
    """From 1."""
    loss: float
    """Mean cross entropy in nats a token; of images in nats an image."""
    total_loss: float
    """What is differentiated: cross entropy plus weighted auxiliary losses."""
    lr: float
    """Learning rate."""
    grad_norm: float
    """Global 2-norm of the gradients before clipping."""
    tokens_per_second: float
    """Tokens a second, over all ranks."""
    step_time: float
    """Seconds."""
    tokens: int
    """Tokens since the first step."""
    mfu: float | None
    """Model FLOP utilisation as a fraction; None where the peak is not known."""
    load_balance: float
    """Load-balancing loss, mean over the layers, not weighted; 1 is balanced."""
    router_z: float
    """Router z-loss, mean over the layers, not weighted."""
    output_z: float
    """Output z-loss, not weighted."""
    imbalance: float
    """Largest over mean load of an expert, mean over the layers; 1 is balanced."""
    drop_rate: float
    """Dropped over chosen assignments."""
    expert_load: list[list[float]]
    """Share of the chosen assignments (L, E): a list for each MoE layer."""
    drop_rate_per_layer: list[float]
    """`drop_rate` of each MoE layer."""
    assignments_per_layer: list[int] = field(default_factory=list)
    """Chosen assignments of each MoE layer in the step; empty in files of older versions."""
    capacity_per_layer: list[int] = field(default_factory=list)
    """Assignments that an expert could serve in a micro-batch, of each MoE layer; empty where there is no limit."""
    delta_per_layer: list[float] = field(default_factory=list)
    """Cosine of tokens and the gate row of their first choice in the step, as the capacity's `delta` says, of each MoE
    layer; empty unless the capacity is estimated."""
    competitors_per_layer: list[float] = field(default_factory=list)
    """s q, tokens of a micro-batch whose cosine with an expert's gate row is at least delta, of each MoE layer; empty
    likewise."""
    drop_rate_by_position: list[float] = field(default_factory=list)
    """Drop rate in up to 16 equal ranges of positions of a sequence, over all layers; empty where there is no limit."""
    exchange_time: float = 0.0
    """Seconds in the all-to-alls of the experts, mean of the ranks, forward and backward, waiting for other ranks
    included; on an accelerator until they were launched. 0 unless ranks share the experts."""
    exchanged_rows_per_layer: list[list[int]] = field(default_factory=list)
    """Rows that all ranks sent to others in the exchanges of each MoE layer, forward and backward: [inside nodes,
    between nodes]; empty unless ranks share the experts."""
    exchanged_bytes_per_layer: list[list[int]] = field(default_factory=list)
    """Bytes of these rows, with their counts and gates; likewise."""

    @property
    def capacity(self) -> float:
        """Mean of `capacity_per_layer`; NaN where there is no limit."""
        return sum(self.capacity_per_layer) / len(self.capacity_per_layer) if self.capacity_per_layer else math.nan

    @property
    def inside_nodes_mb(self) -> float:
        """Megabytes (1e6) exchanged inside nodes, over all layers; 0 where ranks do not share the experts."""
        return sum(inside for inside, _ in self.exchanged_bytes_per_layer) / 1e6

    @property
    def between_nodes_mb(self) -> float:
        """The same between nodes."""
        return sum(between for _, between in self.exchanged_bytes_per_layer) / 1e6


@dataclass(frozen=True)
class EvaluationMetrics:
    """The whole validation set after `step` steps."""

    step: int
    """Optimiser steps so far."""
    val_loss: float
    """Mean cross entropy in nats a token; of images in nats an image."""
    val_bits_per_byte: float | None = None
    """Bits for each byte of the validation text; None, and not in the file, for images."""
    val_accuracy: float | None = None
    """Share of the validation images whose class has the highest score; None, and not in the file, for text."""


class MetricsLog:
    """Writes metrics.jsonl and, where wanted and installed, TensorBoard events.

    Each record is written at once, so that a kill leaves at most one partial line, the last.

    Args:
        run_dir: the run folder; must exist.
        tensorboard: whether to write events too, to RUN_DIR/tensorboard.
        resume_step: the step to go on from: records of later steps are dropped. None starts a fresh file.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, resume_step: int | None):
        path = Path(run_dir) / METRICS_FILE
        if resume_step is not None and path.exists():
            _cut(path, resume_step)
        self._file = path.open("w" if resume_step is None else "a", encoding="utf-8", buffering=1)
        self._events: EventLog | None = None
        if tensorboard:
            try:
                self._events = EventLog(Path(run_dir) / TENSORBOARD_DIR, first_step=(resume_step or 0) + 1)
            except ImportError as error:
                missing = (error.name or "").startswith("tensorboard")
                wrong = "is not installed" if missing else f"fails to import ({error})"
                logger.warning("tensorboard %s: pip install 'moeport[tensorboard]'", wrong)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, metrics: StepMetrics) -> None:
        """Write one step."""
        self._write(vars(metrics))
        if self._events:
            self._events.scalars(metrics.step, step_scalars(metrics))

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Write one evaluation."""
        self._write({name: value for name, value in vars(metrics).items() if value is not None})
        if self._events:
            self._events.scalars(metrics.step, evaluation_scalars(metrics))

    def close(self) -> None:
        """Write out what is pending and close the files."""
        self._file.close()
        if self._events:
            self._events.close()

    def _write(self, values: dict[str, Any]) -> None:
        line = json.dumps(_finite(values), separators=(",", ":"), allow_nan=False)
        self._file.write(line + "\n")


def step_scalars(metrics: StepMetrics) -> dict[str, float]:
    """TensorBoard tags and values of a step."""
    scalars = {
        "train/loss": metrics.loss,
        "train/total_loss": metrics.total_loss,
        "train/lr": metrics.lr,
        "train/grad_norm": metrics.grad_norm,
        "performance/tokens_per_second": metrics.tokens_per_second,
        "performance/step_time": metrics.step_time,
        "moe/load_balance": metrics.load_balance,
        "moe/router_z": metrics.router_z,
        "train/output_z": metrics.output_z,
        "moe/imbalance": metrics.imbalance,
        "moe/drop_rate": metrics.drop_rate,
    }
    if metrics.mfu is not None:
        scalars["performance/mfu"] = metrics.mfu
    if metrics.capacity_per_layer:
        scalars["moe/capacity"] = metrics.capacity
    if metrics.exchanged_bytes_per_layer:
        scalars["communication/inside_nodes_mb"] = metrics.inside_nodes_mb
        scalars["communication/between_nodes_mb"] = metrics.between_nodes_mb
    for layer, capacity in enumerate(metrics.capacity_per_layer):
        scalars[f"moe/capacity/{layer}"] = capacity
        scalars[f"moe/drop_rate/{layer}"] = metrics.drop_rate_per_layer[layer]
    return scalars


def evaluation_scalars(metrics: EvaluationMetrics) -> dict[str, float]:
    """TensorBoard tags and values of an evaluation."""
    scalars = {
        "validation/loss": metrics.val_loss,
        "validation/bits_per_byte": metrics.val_bits_per_byte,
        "validation/accuracy": metrics.val_accuracy,
    }
    return {tag: value for tag, value in scalars.items() if value is not None}


def iterate_metrics(path: Path) -> Iterator[StepMetrics | EvaluationMetrics]:
    """The records of a metrics.jsonl in the order of the file, without a partial last line.

    Raises:
        DataError: where any other line is no record.
    """
    for number, (_, record) in enumerate(_records(path), 1):
        try:
            yield _parse(record)
        except KeyError as error:
            raise DataError(f"{path}:{number}: has no {error.args[0]}, which every such record has") from None


def read_metrics(path: Path) -> tuple[list[StepMetrics], list[EvaluationMetrics]]:
    """All steps and all evaluations of a metrics.jsonl; errors as in `iterate_metrics`."""
    steps, evaluations = [], []
    for record in iterate_metrics(path):
        if isinstance(record, StepMetrics):
            steps.append(record)
        else:
            evaluations.append(record)
    return steps, evaluations


def _parse(record: dict[str, Any]) -> StepMetrics | EvaluationMetrics:
    kind: type[StepMetrics] | type[EvaluationMetrics] = EvaluationMetrics if "val_loss" in record else StepMetrics
    values: dict[str, Any] = {}
    for known in fields(kind):
        optional = known.default is not MISSING or known.default_factory is not MISSING
        if optional and known.name not in record:
            continue
        value = record[known.name]
        values[known.name] = math.nan if value is None and known.name != "mfu" else value
    return kind(**values)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines and what they say."""
    faulty = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if faulty:
                raise DataError(f"{path}:{faulty}: is no record of metrics; only the last line may be cut off")
            try:
                record = json.loads(line)
            except ValueError:
                faulty = number
                continue
            yield line.rstrip("\n") + "\n", record


def _cut(path: Path, last_step: int) -> None:
    """Drop the records of steps after `last_step`."""
    kept = path.with_name(path.name + ".tmp")
    with kept.open("w", encoding="utf-8") as file:
        file.writelines(line for line, record in _records(path) if record["step"] <= last_step)
        file.flush()
        os.fsync(file.fileno())
    kept.replace(path)


def _finite(value: Any) -> Any:
    """`value` with None for every NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    return [_finite(child) for child in value] if isinstance(value, list) else value
