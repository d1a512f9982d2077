"""Signals as a request to stop after the current step."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any

from moeport.stopping import handled, install, restore


class StopRequest:
    """True once a signal has arrived; a later one acts as usual. Outside the main thread, signals are left alone.

    Args:
        repeats_within: seconds in which further signals belong to the first one: a launcher passes on to its ranks what
            they have received themselves.
    """

    def __init__(self, repeats_within: float = 0.0) -> None:
        self.requested = False
        self._window = repeats_within
        self._is_ours = _FirstSignal(repeats_within)
        self._previous: dict[signal.Signals, Any] = {}
        self._stack = ExitStack()

    def __bool__(self) -> bool:
        return self.requested

    def __enter__(self) -> StopRequest:
        self._previous = install(self._request)
        self._stack.enter_context(handled(_FirstSignal(self._window)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        self._stack.close()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._is_ours():
            self.requested = True
            if not self._window:
                self._restore()
            return
        handler = self._previous[signal.Signals(number)]
        self._restore()
        if callable(handler):
            handler(number, frame)
        else:
            signal.raise_signal(number)

    def _restore(self) -> None:
        restore(self._previous)
        self._previous = {}


class _FirstSignal:
    """Called at each signal: whether it is the first one, or follows it within some seconds."""

    def __init__(self, window: float):
        self._window = window
        self._first: float | None = None

    def __call__(self) -> bool:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return True
        return now - self._first < self._window
