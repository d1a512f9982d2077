"""metrics.jsonl: one JSON line per step and per evaluation. `metrics_table` defines the fields."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from moeport.errors import DataError
from moeport.files import writing
from moeport.reading import parse_json, read_lines
from moeport.training.metric import Metric
from moeport.training.metrics_record import parsed
from moeport.training.metrics_repair import Cut
from moeport.training.metrics_table import ROWS, EvaluationMetrics, Record, StepMetrics, scalars
from moeport.training.metrics_thinning import Thinning
from moeport.training.run_dir import METRICS_FILE
from moeport.training.trackers.tracking import Trackers


class MetricsLog:
    """Writes metrics.jsonl, and hands every record to the trackers.

    Each record is written at once, so that a kill leaves at most one partial line, the last.

    Args:
        run_dir: the run folder; must exist.
        resume_step: the step to resume from; records of later steps are dropped. None starts a new file.
        thinning: which lists are written; default as its own.
        trackers: those of the run; default none.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int | None,
        thinning: Thinning | None = None,
        trackers: Trackers | None = None,
    ):
        self._thinning, self._trackers = thinning or Thinning(), trackers or Trackers()
        path = Path(run_dir) / METRICS_FILE
        self._path, self._evaluated = path, 0
        self.notes: list[str] = []
        """What was wrong with the file that it continues, a line each."""
        if resume_step is not None:
            cut = Cut(path, resume_step)
            self.notes, self._evaluated = cut.notes, resume_step if cut.evaluated else 0
        with writing(path):
            self._file = path.open("w" if resume_step is None else "a", encoding="utf-8", buffering=1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, metrics: StepMetrics) -> None:
        """Write one step."""
        rows = ROWS[StepMetrics]
        self._write(
            {name: x for name, x in self._thinning.kept(vars(metrics)).items() if not _is_left_out(rows[name], x)}
        )
        self._trackers.log(metrics.step, scalars(metrics))

    def skipped(self, step: int) -> None:
        """Write that a step was passed over."""
        self._write({"step": step, "skipped": True})

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Write one evaluation, unless the file that this one continues has it."""
        if metrics.step == self._evaluated:
            return
        self._write({name: value for name, value in vars(metrics).items() if value is not None})
        self._trackers.log(metrics.step, scalars(metrics))

    def sync(self) -> None:
        """Flush the records to disk, so that no checkpoint outlives those of its steps."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write out what is pending and close the file."""
        with writing(self._path):
            self._file.close()

    def _write(self, values: dict[str, Any]) -> None:
        line = json.dumps(_finite(values), separators=(",", ":"), allow_nan=False)
        with writing(self._path):
            self._file.write(line + "\n")


def iterate_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics.jsonl in the order of the file, without skipped steps and a partial last line.

    Raises:
        DataError: any other line is not a metrics record.
    """
    for number, values in enumerate(_values(path), 1):
        try:
            record = parsed(values)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if record:
            yield record


def read_metrics(path: Path) -> tuple[list[StepMetrics], list[EvaluationMetrics]]:
    """All steps and all evaluations of a metrics.jsonl; errors as in `iterate_metrics`."""
    steps, evaluations = [], []
    for record in iterate_metrics(path):
        if isinstance(record, StepMetrics):
            steps.append(record)
        else:
            evaluations.append(record)
    return steps, evaluations


def _values(path: Path) -> Iterator[Any]:
    """The value of each line, without a partial last one."""
    faulty = 0
    try:
        for number, line in enumerate(read_lines(path), 1):
            if faulty:
                raise DataError(f"{path}:{faulty}: is not a metrics record; only the last line may be incomplete")
            try:
                values = parse_json(line)
            except ValueError:
                faulty = number
                continue
            yield values
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _is_left_out(row: Metric, value: Any) -> bool:
    if value is None:
        return row.only_if_known
    return row.left_out_of_file is not None and row.left_out_of_file == value


def _finite(value: Any) -> Any:
    """`value` with None for every NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    return [_finite(child) for child in value] if isinstance(value, list) else value
