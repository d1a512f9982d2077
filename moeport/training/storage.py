"""Whether all ranks see the run folder, where each writes its part of every checkpoint."""

from __future__ import annotations

import shutil

import numpy as np

from moeport.comm.agreement import Topic
from moeport.files import find_temporary, start_folder, token_of
from moeport.training.agreed import SAME_CHECKPOINT
from moeport.training.prepare import PreparedRun

SEEN_SECONDS = 10.0
"""Time after which a folder that another rank has made is not there: network storage may show it late."""


def check_shared(run: PreparedRun) -> None:
    """Refuse a run folder that is not the same for all ranks; every rank calls it, before the first step.

    Raises DisagreementError, on every rank, which names those that do not see what the first rank writes.
    """
    world = run.mesh.world
    if world.size == 1:
        return
    trial = start_folder(run.checkpoints / "trial") if run.is_first else None
    try:
        token = int(world.sum_of_numbers(np.array([float(token_of(trial)) if trial else 0.0]))[0])
        seen = trial or find_temporary(run.checkpoints, token, SEEN_SECONDS)
        what = "whether run.dir has what the first rank writes there"
        world.agree(Topic(SAME_CHECKPOINT, {what: seen is not None}))
    finally:
        if trial:
            shutil.rmtree(trial, ignore_errors=True)
