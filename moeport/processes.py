"""Processes that this one starts: where they find packages, which cores they have, and how they ended."""

from __future__ import annotations

import os
import signal
import sys


def python_path() -> str:
    """PYTHONPATH of a process that finds the packages that this one finds, in whatever folder it runs."""
    return os.pathsep.join(map(os.path.abspath, sys.path))


def usable_cores(pid: int = 0) -> int:
    """Number of cores that a process may use; 0 is this one."""
    return len(cores_of(pid))


def cores_of(pid: int) -> set[int]:
    """The cores that a process may use; 0 is this one."""
    if not hasattr(os, "sched_getaffinity"):
        return {*range(os.cpu_count() or 1)}
    try:
        return os.sched_getaffinity(pid)
    except OSError:  # the process has ended, or is hidden
        return set()


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
