"""SwanLab, through its client."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from moeport.training.trackers.tracker import Ending, Row, Start, Tracker, numbers

STATES = {Ending.FINISHED: "success", Ending.FAILED: "crashed", Ending.INTERRUPTED: "aborted"}


class SwanLab(Tracker):
    """A run of SwanLab. Offline it is a folder `run-*`, which `swanlab sync` sends.

    Values that are not finite are left out, since SwanLab takes none.
    """

    def __init__(self, start: Start):
        import swanlab

        start.folder.mkdir(parents=True, exist_ok=True)
        self._run = swanlab.init(
            log_dir=str(start.folder),
            project=start.project,
            name=start.label,
            id=start.run_id,
            resume="allow",
            mode="online" if start.online else "offline",
            config=dict(start.config),
        )
        self.run_id = self._run.id
        self._step = start.done

    @override
    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({tag: value for tag, value in row.values.items() if math.isfinite(value)}, step=row.step)
            self._step = row.step

    @override
    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.log({f"summary/{key}": value for key, value in numbers(values).items()}, step=self._step)

    @override
    def close(self, ending: Ending) -> None:
        self._run.finish(state=STATES[ending], error=None if ending is Ending.FINISHED else ending.value)
