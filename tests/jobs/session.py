"""A test run, with a keeper that outlives it."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

from tests.jobs.keeper import VARIABLE

FORKER = "tests/jobs/forker.py"


def begin():
    """Mark this process's children as those of one run; returns the keeper, which `end` wants."""
    os.environ[VARIABLE] = token = f"{os.getpid()}-{uuid.uuid4().hex}"
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")), token]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def end(keeper):
    """Commands of processes that tests have left, which have ended now."""
    out, _ = keeper.communicate(timeout=60)
    return [line for line in out.splitlines() if FORKER not in line]
