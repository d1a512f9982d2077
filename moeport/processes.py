"""Processes that this one starts: where they find packages, how they ended and what they said last."""

from __future__ import annotations

import os
import signal
import sys


def python_path() -> str:
    """PYTHONPATH of a process that finds the packages that this one finds, in whatever folder it runs."""
    return os.pathsep.join(map(os.path.abspath, sys.path))


def ending_of(code: int) -> str:
    """How a process ended, such as `exit code 1` or `SIGABRT`, by its return code: a signal's is negative."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def last_line(text: str) -> str:
    """The last line that is not blank; empty if there is none."""
    return (text.strip().splitlines() or [""])[-1].strip()
