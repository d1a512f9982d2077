"""`moeport train CONFIG` in a process of a job, of which one rank fails in its second save: FOLDER RANK HOW CONFIG.

HOW is `full`, where files may no longer grow, as on a full disk; `killed`; `diverged`, where the part of a parameter
that the rank holds becomes NaN just before; or `elsewhere`, where each rank has a folder of its own, to which the
relative `run.dir` leads.
"""

import math
import os
import resource
import signal
import sys
from pathlib import Path

from moeport.cli.main import main
from moeport.training import saving, storage

LIMIT = 10_000
"""Bytes that a file may have on a full disk; less than a rank's part of the parameters."""
NEVER = 10_000.0

folder, failing, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
rank, write, calls = os.environ["RANK"], saving.write_rank, []


def failing_write(*arguments):
    calls.append(arguments)
    if rank != failing or len(calls) != 2:
        return write(*arguments)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        write(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def diverged_save(self, *arguments):
    if self.saved_step == 2 and rank == failing and how == "diverged":
        next(self.run.trainer.model.shards()).array.fill(math.nan)
    save(self, *arguments)


(folder / f"pid.{rank}").write_text(str(os.getpid()))
saving.write_rank, save, saving.Saver.save = failing_write, saving.Saver.save, diverged_save
saving.FOLDER_SECONDS = NEVER  # the end must not come from waiting for long enough
storage.SEEN_SECONDS = 1.0
if how == "elsewhere":
    (folder / f"of-{rank}").mkdir()
    os.chdir(folder / f"of-{rank}")
sys.argv = ["moeport", "train", sys.argv[4]]
main()
