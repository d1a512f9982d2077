"""Notices that other processes keep the machine busy, and applies a remedy for as long as they do.

Linux counts for each thread the nanoseconds in which it was ready to run and had no core
(`/proc/PID/task/*/schedstat`). Where it does not, preemptions are counted instead.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

BUSY_SHARE = 0.10
"""The machine is busy once threads wait for a core for this share of the time, summed over the threads."""
CALM_SHARE = 0.20
"""It may be calm again once they wait for less. The remedy makes threads sleep and wake, which counts as waiting, so
that only a trial without it shows whether the machine is calm.
"""
CALM_SECONDS = 3.0
"""How long they must wait for less before the first trial. Each trial that fails doubles it."""
LONGEST_SECONDS = 60.0
"""Limit of that doubling; a trial also comes after this time in any case."""
SETTLED_SECONDS = 10.0
"""A trial has succeeded when the machine was calm for this long."""
INTERVAL_SECONDS = 0.25
"""Between two readings."""
PREEMPTION_SECONDS = 0.003
"""Time without a core that a preemption is taken for: a usual time slice of Linux."""


class WaitClock:
    """Counts the seconds that the threads of this process had to wait for a core."""

    def __init__(self, process: Path = Path("/proc/self")):
        self.tasks = process / "task"
        self.counts_waits = (process / "schedstat").is_file()

    def read(self) -> float:
        """The sum over threads so far; only the difference of two readings has a meaning."""
        if not self.counts_waits:
            return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw * PREEMPTION_SECONDS
        total = 0
        for thread in self.tasks.iterdir():
            try:
                total += int((thread / "schedstat").read_text().split()[1])
            except (OSError, IndexError):  # the thread has just ended
                continue
        return total * 1e-9


class BusyState:
    """Decides whether the machine is busy: at once that it is, and only by trial that it no longer is."""

    def __init__(self) -> None:
        self.busy = False
        self.settled = True
        """Whether `busy` is more than a trial."""
        self._patience = CALM_SECONDS
        self._changed = self._calm_since = -float("inf")

    def update(self, share: float, now: float) -> None:
        """Take in the share of time that threads waited in the interval that ended at `now`, in seconds."""
        if self.busy:
            if share >= CALM_SHARE:
                self._calm_since = now
            if now - self._calm_since >= self._patience or now - self._changed >= LONGEST_SECONDS:
                self.busy, self.settled, self._changed = False, False, now
        elif share >= BUSY_SHARE:
            self._patience = CALM_SECONDS if self.settled else min(2 * self._patience, LONGEST_SECONDS)
            self.busy, self.settled, self._changed, self._calm_since = True, True, now, now
        elif now - self._changed >= SETTLED_SECONDS:
            self.settled = True


class Remedy(Protocol):
    """What helps the threads of this process on a busy machine. Results must be the same with and without it."""

    busy: str
    """What is said when it begins to be used."""
    calm: str
    """What is said when it is no longer used."""

    def start(self) -> None:
        """Begin to use it."""

    def stop(self) -> None:
        """Return to what is best on a calm machine."""


class Watch:
    """Applies a remedy while the machine is busy.

    Args:
        remedy: what helps.
        clock: seconds that threads had to wait so far.
    """

    def __init__(self, remedy: Remedy, clock: Callable[[], float] | None = None):
        self.remedy, self.state = remedy, BusyState()
        self._clock = clock or WaitClock().read
        self._told = self._settled = False
        self._line = ""
        self._waited, self._then = self._clock(), time.monotonic()

    def start(self) -> None:
        """Look at the clock in a thread of its own, for as long as the process runs."""
        threading.Thread(target=self._run, name="moeport-watch", daemon=True).start()

    def news(self) -> list[str]:
        """What is different from the last call, at most one line: what came and went meanwhile is not told."""
        if self._told == self._settled:
            return []
        self._told = self._settled
        return [self._line]

    def look(self, now: float) -> None:
        """Read the clock at `now`, in seconds, and start or stop the remedy."""
        reading, before = self._clock(), self.state.busy
        share = max(0.0, reading - self._waited) / (now - self._then)
        self._waited, self._then = reading, now
        self.state.update(share, now)
        if self.state.busy != before:
            (self.remedy.start if self.state.busy else self.remedy.stop)()
        if self.state.settled and self.state.busy != self._settled:
            self._settled = self.state.busy
            waited = f"{self.remedy.busy} (threads had no core for {share:.0%} of the time)"
            self._line = waited if self.state.busy else self.remedy.calm

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL_SECONDS)
            self.look(time.monotonic())
