"""MLflow, through its client."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from typing_extensions import override

from moeport.training.trackers.tracker import Ending, Row, Start, Tracker, flat, numbers

STATUS = {Ending.FINISHED: "FINISHED", Ending.FAILED: "FAILED", Ending.INTERRUPTED: "KILLED"}
MOST_METRICS, MOST_PARAMS, MOST_CHARACTERS = 1000, 100, 6000
"""What one request takes, by the limits of its REST API; characters of the value of a parameter."""
NOT_IN_ADDRESSES = "?%"
"""What a path in the address of a database would mean something else by."""


class MLflow(Tracker):
    """A run of MLflow. Offline it is in `mlflow.db`, an SQLite file, and the folder `artifacts` beside it.

    Steps that come again after a resume are in the history of a metric twice: MLflow deletes nothing.
    """

    def __init__(self, start: Start):
        folder = start.folder.resolve()
        if not start.online:
            if set(NOT_IN_ADDRESSES) & set(str(folder)):
                raise ValueError(f"its database cannot be in {folder}: a path with ? or %; choose another run.dir")
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._artifacts = Metric, None
        if start.online:
            self._client = MlflowClient()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._artifacts = (folder / "artifacts").as_uri()
            self._client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        if start.run_id:
            self.run_id = start.run_id
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self._client.create_run(self._experiment(start.project), run_name=start.label).info.run_id
            params = [Param(key, str(value)[:MOST_CHARACTERS]) for key, value in flat(start.config).items()]
            for some in _groups(params, MOST_PARAMS):
                self._client.log_batch(self.run_id, params=some)
        self._client.log_dict(self.run_id, dict(start.config), "config.json")

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        made = found.experiment_id if found else self._client.create_experiment(name, self._artifacts)
        return str(made)

    @override
    def log(self, rows: Sequence[Row]) -> None:
        metrics = [
            self._metric(tag, value, int(row.time * 1000), row.step)
            for row in rows
            for tag, value in row.values.items()
        ]
        for some in _groups(metrics, MOST_METRICS):
            self._client.log_batch(self.run_id, metrics=some)

    @override
    def summary(self, values: Mapping[str, Any]) -> None:
        self._client.log_dict(self.run_id, dict(values), "summary.json")
        for key, value in numbers(values).items():
            self._client.log_metric(self.run_id, f"summary/{key}", value)

    @override
    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self.run_id, STATUS[ending])


def _groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))
