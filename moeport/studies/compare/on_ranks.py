"""Runs of a comparison on several ranks: each is a job of its own, started as a user would start it."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moeport.config import resolved_yaml
from moeport.errors import InterruptedRunError, NonFiniteError, RunError
from moeport.files import write_text
from moeport.launch.orphans import started_here
from moeport.stopping import INTERRUPTED
from moeport.studies.compare.plan import PlannedRun

CONFIG_FOLDER = "configs"
"""In the folder of the comparison: the config of each run, which its ranks read."""


@dataclass(frozen=True)
class Ranks:
    """Where each run of a comparison is trained; called with a run, as `moeport.studies.compare.compare.Train` is."""

    nodes: int = 1
    """Number of nodes; several are emulated on this machine, which needs root."""
    ranks_per_node: int = 1
    inter: str | None = None
    """Rate of each emulated node's link, such as 200mbit; None: unlimited."""

    def __call__(self, run: PlannedRun, console: Console) -> None:
        """Train a run to its end in a job, which ends with this process.

        Raises InterruptedRunError, NonFiniteError, or RunError with the last lines that the job wrote to its standard
        error.
        """
        file = run.dir.parent / CONFIG_FOLDER / f"{run.dir.name}.yaml"
        write_text(file, resolved_yaml(run.config))
        errors = file.with_suffix(".stderr")
        with errors.open("wb") as stream:
            job = subprocess.Popen(self._command(file), stderr=stream)
            try:
                code = job.wait()
            except KeyboardInterrupt:  # the job has got it too, and saves
                code = job.wait() and INTERRUPTED
        if code:
            _raise(run, code, errors.read_text(encoding="utf-8", errors="replace"))

    def _command(self, file: Path) -> list[str]:
        start = [*started_here(signal.SIGTERM), "moeport"]
        ranks = ["--ranks-per-node", str(self.ranks_per_node)]
        if self.nodes == 1 and self.inter is None:
            return [*start, "launch", str(file), *ranks, "--resume", "--run"]
        link = ["--inter", self.inter] if self.inter else []
        return [*start, "emulate", "--nodes", str(self.nodes), *ranks, *link, "--", "train", str(file), "--resume"]


def _raise(run: PlannedRun, code: int, errors: str) -> None:
    """Raise what the exit code of a job means."""
    if code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        raise InterruptedRunError(f"{run.dir}: interrupted")
    lines = [line for line in errors.splitlines() if line.strip()]
    first = next((line for line in lines if line.startswith("error:")), "")
    said = first.removeprefix("error:").strip() or " | ".join(lines[-3:]) or "it said nothing"
    kind = NonFiniteError if "is not finite" in said or "validation loss after it is" in said else RunError
    raise kind(f"the job of {run.dir} ended with exit code {code}: {said}")
