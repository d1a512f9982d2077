"""Jobs of which a rank is killed while a checkpoint is written in the background."""

import json
import os
import random
import signal
import time

from moeport.config import resolved_yaml
from moeport.errors import CheckpointError
from moeport.training.checkpoint import list_checkpoints, verify_checkpoint
from tests.comm.jobs import ROOT, start
from tests.faults.runs import HANG_SECONDS, litter
from tests.faults.tally import Tally
from tests.training.tiny import TIMED, tiny_config

AWAY_SECONDS = 0.2
"""Longest time from when a save is seen to have begun to the kill."""


class Killed:
    """A run that goes on until it has been killed a number of times.

    Args:
        folder: where it lies.
        ranks: of the job.
        steps: of the run; there is a checkpoint of each.
    """

    def __init__(self, folder, ranks, steps):
        self.folder, self.ranks, self.starts = folder, ranks, 0
        folder.mkdir(parents=True)
        self.config = tiny_config(
            folder,
            model={
                "d_model": 64,
                "attention": {"num_heads": 2, "num_kv_heads": 1},
                "moe": {"num_experts": 16, "expert_hidden": 256, "router": {"name": "topk", "top_k": 1}},
            },
            training={"steps": steps, "batch_size": 4, "evaluation_interval": 0},
            checkpoint={"interval": 1, "keep_last": 3, "asynchronous": True},
            parallelism={"expert": min(ranks, 2)},
            backend={"dtype": "float32"},
        )
        (folder / "config.yaml").write_text(resolved_yaml(self.config))
        self.checkpoints = self.config.run.dir / "checkpoints"

    def start(self):
        self.starts += 1
        place = self.folder / f"job-{self.starts}"
        script = str(ROOT / "tests/training/ranks_cli.py")
        command = [script, str(place), "train", str(self.folder / "config.yaml"), "--resume"]
        return start("torch", self.ranks, command, place)

    def finish(self):
        job = self.start()
        try:
            assert job.wait(HANG_SECONDS) == 0, job.output()[-3000:]
        finally:
            job.end()

    def kill(self, chance):
        """Start it, and kill a rank while a save is under way; whether there was one left to kill in."""
        left = self._saves()
        job = self.start()
        try:
            end = time.monotonic() + HANG_SECONDS
            while not self._saves() - left:
                if job.launcher.poll() is not None:
                    return False
                assert time.monotonic() < end, job.output()[-3000:]
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, AWAY_SECONDS))
            running = job.left()
            if not running:
                return False
            os.kill(chance.choice(running), signal.SIGKILL)
            job.wait(HANG_SECONDS)
            assert job.left() == [], "the others end with it"
            return True
        finally:
            job.end()

    def _saves(self):
        """Temporary folders, of saves that are under way or were cut off."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        return {name for name in names if name.startswith(".step-")}

    def outcome(self):
        """What it leaves, as far as it does not depend on time."""
        found = {}
        for path in list_checkpoints(self.checkpoints):
            found |= {str(file.relative_to(self.checkpoints)): file.read_bytes() for file in path.glob("[!m]*")}
            found |= {str(file.relative_to(self.checkpoints)): file.read_bytes() for file in path.glob("model*")}
        for line in (self.config.run.dir / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            for key in set(record) - {*TIMED, "exchange_time"}:
                found[f"{record['step']}: {key}"] = record[key]
        return found


def killed(tries, folder, ranks, seed=0):
    """A run that is killed so often, and is then what it would have been without."""
    tally, chance = Tally(f"SIGKILL of a rank of {ranks} during asynchronous saves"), random.Random(seed)
    steps = 3 * tries + 4
    whole = Killed(folder / "whole", ranks, steps)
    whole.finish()
    run = Killed(folder / "killed", ranks, steps)
    for number in range(tries):
        if not run.kill(chance):
            break
        tally.tries += 1
        try:
            for path in list_checkpoints(run.checkpoints):
                verify_checkpoint(path)
        except CheckpointError as error:
            tally.lost.append(f"kill {number}: {error}")
    run.finish()
    want, found = whole.outcome(), run.outcome()
    wrong = [name for name in want.keys() | found.keys() if want.get(name) != found.get(name)]
    tally.right("the run in the end", "; ".join([*sorted(wrong)[:4], *litter(run.checkpoints)]))
    return tally
