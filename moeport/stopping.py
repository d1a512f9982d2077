"""Signals that ask a command to end: exit code 130, and nothing half-written.

Python runs a signal's handler between two instructions, which a long call into a library delays. So a thread watches
too: it ends the process where the handler has had no effect for a while, or where a second signal arrives.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from moeport.files import discard_temporaries

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"))
"""Signals that ask for an end. Slurm, other schedulers and closed terminals send the last three."""
INTERRUPTED = 130
"""Exit code after any of them."""
GRACE_SECONDS = 10.0
"""Time that a command has to end by itself."""
_watch: Interruptible | None = None


def asks_to_end(handler: Any) -> bool:
    """Whether a signal's handler is the usual one: the system's, or that of `Interruptible`."""
    return handler is signal.SIG_DFL or (_watch is not None and handler == _watch.interrupt)


def install(handler: Any, signals: tuple[signal.Signals, ...] = SIGNALS) -> dict[signal.Signals, Any]:
    """Set a handler for signals, except those that are ignored, as `nohup` has SIGHUP ignored.

    Returns: the handlers before, for `restore`; none outside the main thread, where handlers cannot be set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore(handlers: dict[signal.Signals, Any]) -> None:
    """Set handlers that `install` has replaced."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def handled(is_ours: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """In the block, signals are seen to by the caller and do not end the process.

    Args:
        is_ours: called at each signal, in a thread: whether that holds for it.
    """
    if _watch is None:
        yield
        return
    before, _watch.is_handled = _watch.is_handled, is_ours
    try:
        yield
    finally:
        _watch.is_handled = before


class Interruptible:
    """In the block, a signal raises KeyboardInterrupt; a second one, or no effect within some seconds, ends at once.

    Args:
        grace: seconds until a process that does not end by itself is ended.

    Attributes:
        received: name of the first signal; None so far.
    """

    def __init__(self, grace: float = GRACE_SECONDS):
        self.received: str | None = None
        self.is_handled: Callable[[], bool] = lambda: False
        self._grace, self._count = grace, 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruptible:
        global _watch
        _watch = self
        self._before = install(self.interrupt)
        if self._before:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._wait, name="moeport-signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _watch
        _watch = None
        if self._before:
            signal.set_wakeup_fd(self._previous)
            os.close(self._writer)
            self._thread.join()
            os.close(self._reader)
            restore(self._before)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.received = self.received or signal.Signals(number).name
        raise KeyboardInterrupt

    def _wait(self) -> None:
        """Runs in the thread: reads the numbers of signals until the pipe is closed."""
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                if number not in SIGNALS or self.is_handled():
                    continue
                self._count += 1
                if self._count > 1:
                    end_at_once()
                timer = threading.Timer(self._grace, end_at_once)
                timer.daemon = True
                timer.start()


def end_at_once() -> None:
    """End the process now, without what it was writing."""
    discard_temporaries()
    os._exit(INTERRUPTED)
