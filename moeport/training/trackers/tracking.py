"""The trackers of a run: which there are, how they start, and how a resumed run continues in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from moeport.config.schema import Config
from moeport.config.trackers import TRACKERS, TrackerFacts
from moeport.errors import InterruptedRunError, UserError
from moeport.files import write_json
from moeport.reading import read_json
from moeport.training.trackers.feed import Feed, logger
from moeport.training.trackers.tracker import Ending, Row, Start, Tracker

TENSORBOARD_DIR, TRACKERS_DIR = "tensorboard", "trackers"
RUN_FILE = "run.json"
"""Which run of a tracker a resumed run continues."""


class Trackers:
    """All trackers of a run; a context manager, which tells them at its end how the run has ended.

    Args:
        feeds: one for each; none: nothing happens.
    """

    def __init__(self, feeds: Sequence[Feed] = ()):
        self._feeds = feeds

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ending = Ending.FAILED if error else Ending.FINISHED
        if isinstance(error, InterruptedRunError | KeyboardInterrupt):
            ending = Ending.INTERRUPTED
        for feed in self._feeds:
            feed.close(ending)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the metrics of a step or an evaluation, by tag."""
        for feed in self._feeds:
            feed.put(Row(step, time.time(), values))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Hand over the summary of a finished run."""
        for feed in self._feeds:
            feed.put(values)


def check_trackers(config: Config) -> None:
    """Raises UserError, which says what to install, for a tracker that is asked for and not installed."""
    for index, each in enumerate(config.metrics.trackers):
        facts = TRACKERS[each.name]
        if not _is_installed(facts):
            raise UserError(
                f"metrics.trackers[{index}].name: {each.name} is not installed; install it with {facts.install}, or "
                "leave this tracker out"
            )


def open_trackers(run_dir: Path, config: Config, done: int) -> Trackers:
    """Start the trackers that the config asks for; the first rank calls it.

    Args:
        run_dir: the run folder.
        config: the whole config.
        done: steps done before; 0 starts new runs in the trackers.
    """
    return Trackers([Feed(name, connect) for name, connect in _wanted(run_dir, config, done)])


def _wanted(run_dir: Path, config: Config, done: int) -> Iterator[tuple[str, Callable[[], Tracker]]]:
    values = config.model_dump(mode="json")
    if config.metrics.tensorboard:
        facts = TRACKERS["tensorboard"]
        if _is_installed(facts):
            start = Start(run_dir / TENSORBOARD_DIR, values, done)
            yield "tensorboard", partial(_made, facts, start)
        else:
            logger.warning("tensorboard is not installed: %s", facts.install)
    for each in config.metrics.trackers:
        folder = run_dir / TRACKERS_DIR / each.name
        online, label = each.mode == "online", each.label or run_dir.resolve().name
        run = {"mode": each.mode, "project": each.project}
        start = Start(folder, values, done, each.project, label, online, _run_id(folder, run) if done else None)
        yield each.name, _connection(TRACKERS[each.name], start, run)


def _connection(facts: TrackerFacts, start: Start, run: Mapping[str, str]) -> Callable[[], Tracker]:
    def connect() -> Tracker:
        tracker = _made(facts, start)
        write_json(start.folder / RUN_FILE, {**run, "id": tracker.run_id})
        return tracker

    return connect


def _made(facts: TrackerFacts, start: Start) -> Tracker:
    cls: Callable[[Start], Tracker] = getattr(import_module(facts.module), facts.cls)
    return cls(start)


def _run_id(folder: Path, run: Mapping[str, str]) -> str | None:
    """The identifier of the run to continue; None if there is none in this mode and project."""
    try:
        values = read_json(folder / RUN_FILE)
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or {**values, **run} != values:
        return None
    found = values.get("id")
    return found if isinstance(found, str) and found else None


def _is_installed(facts: TrackerFacts) -> bool:
    return find_spec(facts.package) is not None
