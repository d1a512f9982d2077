"""Weights & Biases, through its client."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from moeport.training.trackers.tracker import Ending, Row, Start, Tracker

EXIT_CODES = {Ending.FINISHED: 0, Ending.FAILED: 1, Ending.INTERRUPTED: 130}


class WandB(Tracker):
    """A run of Weights & Biases. Offline it is a folder `offline-run-*`, which `wandb sync` sends.

    Steps that come again after a resume have the values that they had; the service keeps the first ones.
    """

    def __init__(self, start: Start):
        if not start.online:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        start.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            dir=start.folder,
            project=start.project,
            name=start.label,
            id=start.run_id,
            resume="allow" if start.online else None,
            mode="online" if start.online else "offline",
            config=dict(start.config),
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run_id = self._run.id

    @override
    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({**row.values, "_timestamp": row.time}, step=row.step)

    @override
    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update({"summary": dict(values)})

    @override
    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=EXIT_CODES[ending])
