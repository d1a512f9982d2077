"""Work that a thread does in the background, whose failure is raised by whoever waits for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

NICENESS = 10
"""Of the thread, where the system has one for each: training goes first."""


class Beside:
    """A thread that does one thing. It ends with the process, and leaves nothing half-done that is not allowed to be.

    Args:
        work: what it does; an error is kept for `check` and `wait`.
    """

    def __init__(self, work: Callable[[], None]):
        self._work = work
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raises the error of the work, if it has failed already."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait for the end of the work. Raises its error."""
        self._thread.join()
        self.check()

    def _run(self) -> None:
        with suppress(AttributeError, OSError):  # Linux alone has a priority for each thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._work()
        except Exception as error:  # raised by `check` and `wait`
            self._error = error
