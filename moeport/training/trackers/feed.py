"""A thread that feeds one tracker, so that neither its speed nor its failures reach training."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from moeport.training.trackers.tracker import Ending, Row, Tracker

logger = logging.getLogger(__name__)

MOST_WAITING = 4096
"""Rows that wait for a tracker; it loses those that come while as many wait."""
MOST_TOGETHER = 256
"""Rows that it is given at once."""
FINISH_SECONDS = 120.0
"""Time that a tracker has for what is pending when the run has ended."""
INTERRUPTED_SECONDS = 10.0
"""The same where a signal asks for an end."""


class Feed:
    """Feeds one tracker. Its first failure is said once, with the reason; from then on it gets nothing more.

    Args:
        name: what messages call it.
        connect: makes the tracker; called in the thread.
    """

    def __init__(self, name: str, connect: Callable[[], Tracker]):
        self.name, self._connect = name, connect
        self._waiting: queue.Queue[Row | Mapping[str, Any] | Ending] = queue.Queue(MOST_WAITING)
        self._left_out = 0
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, item: Row | Mapping[str, Any]) -> None:
        """Hand over a row or the summary, without waiting."""
        if not self._thread.is_alive():
            return
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            if not self._left_out:
                logger.warning(
                    "%s is %d rows behind; it loses rows, and metrics.jsonl has all", self.name, MOST_WAITING
                )
            self._left_out += 1

    def close(self, ending: Ending) -> None:
        """Say how the run has ended, and wait a while until the tracker has everything."""
        seconds = INTERRUPTED_SECONDS if ending is Ending.INTERRUPTED else FINISH_SECONDS
        end = time.monotonic() + seconds
        while self._thread.is_alive():
            try:
                self._waiting.put(ending, timeout=0.1)
            except queue.Full:
                if time.monotonic() < end:
                    continue
            break
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("%s has not taken everything in %.0f s; metrics.jsonl has all", self.name, seconds)
        elif self._left_out:
            logger.warning("%s lacks %d rows, which came too fast for it", self.name, self._left_out)

    def _run(self) -> None:
        try:
            self._feed(self._connect())
        except (Exception, SystemExit) as error:  # whatever a client raises, training goes on; some call sys.exit
            reason = " ".join(str(error).split()) or "no details"
            logger.warning(
                "%s gets no more metrics: %s: %s; metrics.jsonl has all", self.name, type(error).__name__, reason
            )

    def _feed(self, tracker: Tracker) -> None:
        while True:
            items = [self._waiting.get()]
            while len(items) < MOST_TOGETHER and not self._waiting.empty():
                items.append(self._waiting.get())
            rows = [item for item in items if isinstance(item, Row)]
            if rows:
                tracker.log(rows)
            for item in items:
                if isinstance(item, Ending):
                    tracker.close(item)
                    return
                if not isinstance(item, Row):
                    tracker.summary(item)
