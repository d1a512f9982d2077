"""A killed run leaves no process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.comm.jobs import ROOT, runs

LAUNCHER = """
import subprocess
print(subprocess.Popen(["tail", "-f", "/dev/null"], stdout=subprocess.DEVNULL, start_new_session=True).pid)
"""
RUN = """
import subprocess, sys, time
from tests.jobs import session
keeper = session.begin()
launched = subprocess.run([sys.executable, "-c", {launcher!r}], stdout=subprocess.PIPE, text=True)
print(launched.stdout.strip(), flush=True)
{then}
"""


def started(then):
    """A run, and the process that a launcher of its has left in a session of its own."""
    run = subprocess.Popen(
        [sys.executable, "-c", RUN.format(launcher=LAUNCHER, then=then)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    return run, int(run.stdout.readline())


def assert_ends(pid):
    deadline = time.monotonic() + 30
    while runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_process(number):
    run, orphan = started("time.sleep(600)")
    assert runs(orphan)
    run.send_signal(number)
    assert run.wait(30) == -number
    run.stdout.close()
    assert_ends(orphan)


def test_a_run_that_ends_says_what_it_left():
    run, orphan = started("print(session.end(keeper))")
    out, _ = run.communicate(timeout=60)
    assert out.strip() == str([f"{orphan} tail -f /dev/null"])
    assert_ends(orphan)
