"""One run that is followed: its metrics so far in bounded memory, and whether it lives."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from moeport.config.schema import Config
from moeport.errors import MoeportError, UserError
from moeport.reading import parse_json, read_json
from moeport.studies.watch.tail import Tail, is_inside
from moeport.training.lock import LOCK_FILE, life
from moeport.training.metrics_record import parsed
from moeport.training.metrics_table import StepMetrics
from moeport.training.progress import RECENT_STEPS
from moeport.training.run_dir import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, read_config
from moeport.training.run_metrics import RunMetrics
from moeport.training.starts import STARTS_FILE, read_starts

POINTS = 240
"""Points of a line: fewer than in a report, since they are sent again and again."""
CELLS = 60_000
"""Cells of all heat maps of a run."""


class Followed:
    """A run as it is on the disk now; only reads, and nothing outside its folder.

    Args:
        run_dir: its folder. UserError if it is none of a run.
        name: what the page calls it.
    """

    def __init__(self, run_dir: Path, name: str):
        if not run_dir.is_dir():
            raise UserError(
                f"{run_dir}: {'is not a folder' if run_dir.exists() else 'no such folder'}; expected a run folder"
            )
        if not any((run_dir / each).exists() for each in (CONFIG_FILE, METRICS_FILE, LOCK_FILE)):
            raise UserError(
                f"{run_dir}: not a run folder: it has no {CONFIG_FILE}; expected the run.dir of a training run"
            )
        self.run_dir, self.name = run_dir, name
        self._tail = Tail(run_dir, METRICS_FILE)
        self._changed: tuple[int, ...] = ()
        self.config: Config | None = None
        self.fault = ""
        """Why its metrics cannot be read; empty if they can."""
        self._begin()
        self.refresh()

    def _begin(self) -> None:
        self.metrics = RunMetrics(POINTS, CELLS)
        self._times: deque[float] = deque(maxlen=RECENT_STEPS)
        self.unreadable = 0
        """Lines of its metrics that are no records."""

    @property
    def is_behind(self) -> bool:
        """Whether more of its metrics waits to be read."""
        return self._tail.is_behind

    def refresh(self) -> bool:
        """Read what has been added; whether anything was."""
        try:
            is_new, lines = self._tail.read()
        except OSError as error:
            self.fault = str(error.strerror or error)
            return False
        self.fault = ""
        if is_new:
            self._begin()
        for line in lines:
            self._add(line)
        return self._read_config() | is_new | bool(lines)

    def _add(self, line: bytes) -> None:
        try:
            record = parsed(parse_json(line.decode("utf-8")))
            if record is None:
                return
            self.metrics.add(record)
        except ValueError:  # no record, or one of another model
            self.unreadable += 1
            return
        if isinstance(record, StepMetrics) and math.isfinite(record.step_time):
            self._times.append(record.step_time)

    def _read_config(self) -> bool:
        """Read the config if it has changed; whether it has."""
        path = self.run_dir / CONFIG_FILE
        try:
            status = path.stat()
        except OSError:
            return False
        found = status.st_ino, status.st_mtime_ns, status.st_size
        if found == self._changed or not is_inside(path, self.run_dir):
            return False
        self._changed = found
        try:
            self.config = read_config(self.run_dir)
        except MoeportError:
            self.config = None
        return True

    @property
    def resumed(self) -> list[int]:
        """The steps after which it was resumed."""
        if not is_inside(self.run_dir / STARTS_FILE, self.run_dir):
            return []
        return [start.step for start in read_starts(self.run_dir) if 0 < start.step <= self.steps]

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.metrics.last.step if self.metrics.num_steps else 0

    @property
    def total(self) -> int | None:
        """Steps of the whole run, if known."""
        return self.config.training.steps if self.config else None

    @property
    def seconds_left(self) -> float | None:
        """Time that the remaining steps take, if they take as long as the recent ones."""
        if self.total is None or not self._times:
            return None
        return sum(self._times) / len(self._times) * max(0, self.total - self.steps)

    @property
    def seconds_since(self) -> float | None:
        """Time since something was added to its metrics."""
        try:
            return max(0.0, time.time() - os.stat(self._tail.path).st_mtime)
        except OSError:
            return None

    def state(self) -> tuple[str, str]:
        """What it does, in a word, and a sentence about it."""
        lock = self.run_dir / LOCK_FILE
        found = life(self.run_dir) if is_inside(lock, self.run_dir) else None
        if found and found.runs:
            return ("training", found.holder) if self.steps else ("starting", found.holder)
        if found and found.holder:
            return "dead", f"{found.holder} has ended and left its lock behind; continue with --resume"
        summary = self._summary()
        if summary and (self.total is None or summary.get("steps") == self.total):
            return "finished", ""
        return "stopped", "No process trains in the folder; continue with --resume"

    def _summary(self) -> dict[str, Any]:
        path = self.run_dir / SUMMARY_FILE
        try:
            values = read_json(path) if is_inside(path, self.run_dir) else None
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}


def followed(run_dirs: list[Path]) -> list[Followed]:
    """The runs of some folders, named by the last part of their paths, or by whole paths if some have the same one.

    Raises UserError for a folder that is none of a run, or is given twice.
    """
    places = [Path(os.path.realpath(run_dir)) for run_dir in run_dirs]
    if len(set(places)) < len(places):
        twice = next(run_dir for number, run_dir in enumerate(run_dirs) if places[number] in places[:number])
        raise UserError(f"{twice}: is given twice; expected each run once")
    names = [place.name for place in places]
    distinct = len(set(names)) == len(names)
    return [
        Followed(run_dir, name if distinct else str(place))
        for run_dir, place, name in zip(run_dirs, places, names, strict=True)
    ]
