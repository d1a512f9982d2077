"""Processes that end with the one that started them, even where that one is killed. Only on Linux.

Run as a module, `python -m moeport.launch.orphans PARENT SIGNAL MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS` that
gets a signal when process PARENT dies.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

from moeport.launch.last_words import FOLDER

PR_SET_PDEATHSIG = 1


def end_with_parent(number: int, parent: int) -> None:
    """Have this process get a signal when its parent dies, or now if it has died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def started_here(number: int) -> list[str]:
    """The beginning of a command, before a module and its arguments, that gets a signal when this process is killed."""
    return [sys.executable, "-m", "moeport.launch.orphans", str(os.getpid()), str(int(number))]


def end_with_launcher() -> None:
    """Have this rank save and end when its launcher is killed, if the launcher is one that waits for its ranks."""
    if "TORCHELASTIC_RUN_ID" in os.environ or FOLDER in os.environ:
        end_with_parent(signal.SIGTERM, os.getppid())


if __name__ == "__main__":
    _parent, _number, _module, *_arguments = sys.argv[1:]
    end_with_parent(int(_number), int(_parent))
    sys.argv = [_module, *_arguments]
    runpy.run_module(_module, run_name="__main__", alter_sys=True)
