"""How long the rest of a comparison will take."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from moeport.studies.compare.outcome import Outcome
from moeport.studies.compare.plan import Plan, PlannedRun
from moeport.training.checkpoint import list_checkpoints
from moeport.training.duration import duration
from moeport.training.run_dir import CHECKPOINT_DIR


def time_left(plan: Plan, outcomes: Mapping[Path, Outcome], choices: Mapping[str, str]) -> str:
    """The end of a line: about how long all runs that are not done yet will take.

    A run takes as long as the finished ones of its config did on average, or else as all finished ones, less what its
    last checkpoint has done. Empty as long as no run has finished.
    """
    seconds: dict[str, list[float]] = {name: [] for name in plan.names}
    for outcome in outcomes.values():
        if outcome.result:
            seconds[outcome.run.name].append(outcome.result.figures.wall_time)
    known = [each for name in plan.names for each in seconds[name]]
    if not known:
        return ""
    usual = {name: statistics.fmean(found or known) for name, found in seconds.items()}
    waiting = [run for run in plan.needed(choices) if run.dir not in outcomes]
    left = sum(usual[run.name] * (1 - _done(run)) for run in waiting)
    left += sum(usual[name] * len(plan.following(name)) for name in plan.sweeps if name not in choices)
    return f", about {duration(left)} left in total"


def _done(run: PlannedRun) -> float:
    """The share of its steps that a run has in its last checkpoint."""
    paths = list_checkpoints(run.dir / CHECKPOINT_DIR)
    return min(1.0, int(paths[-1].name.rpartition("-")[2]) / run.config.training.steps) if paths else 0.0
