"""Runs of a tiny model that something happens to, in processes forked from one that has imported the framework."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import yaml

from tests.jobs.ranks import forker_of, settings
from tests.training.tiny import tiny_values

DRIVER = str(Path(__file__).with_name("driver.py"))
NOTHING = {"do": "SIGKILL"}
"""A fault that does not happen: it has no number of an operation."""
HANG_SECONDS = 120


class Try:
    """One command, with what became of it."""

    def __init__(self, fault, arguments, log, directory=None):
        """`directory` is where the command runs; default: here."""
        self.log = Path(log)
        command = [DRIVER, json.dumps(fault), *map(str, arguments)]
        self.process = forker_of("torch").start(command, settings(), str(self.log), directory)

    def wait(self, seconds=HANG_SECONDS):
        """The exit code, or minus the signal."""
        return self.process.wait(seconds)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)

    def said(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, condition, seconds=HANG_SECONDS):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.said()
            assert self.process.poll() is None, self.said()
            time.sleep(0.005)


def config(folder, **sections):
    """The file of a config whose run, cache and text lie in `folder`."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_values(folder, **sections)))
    return path


def lines(folder):
    """Complete lines of the run's metrics."""
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def litter(folder):
    """Temporary files that lie in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tmp"))
