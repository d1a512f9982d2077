"""Steps of a trained model on an emulated cluster, timed."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeport.files import write_json
from moeport.training.checkpoint import find_checkpoint
from moeport.training.metrics import read_metrics

NODES = 2
TIMED_STEPS, SKIPPED = 24, 4
"""Steps of a timed job, and of those the first, which are left out."""


@dataclass(frozen=True)
class Cluster:
    """An emulated cluster and an all-to-all on it."""

    ranks_per_node: int
    algorithm: str
    rate: str
    """Of each node's link."""

    @property
    def label(self) -> str:
        """As the tables name it."""
        return f"{NODES} x {self.ranks_per_node}, {self.algorithm}"


def timed(
    name: str, file: Path, run: Path, cluster: Cluster, output: Path, settings: Mapping[str, object] | None = None
) -> dict[str, float]:
    """Let a trained model take steps on a cluster; its weights hardly move meanwhile.

    Args:
        name: for messages.
        file: its config.
        run: a finished run, whose last checkpoint it starts from.
        cluster: where.
        output: JSON file that gets the result.
        settings: laid over the config, besides what the timing needs.

    Returns: medians of the seconds of a step and of its all-to-all; means of the megabytes sent between nodes per step
        and of the share of choices on the own node.

    Raises SystemExit if the job fails.
    """
    folder = output.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "run.dir": folder,
        "training.start_from": find_checkpoint(run / "checkpoints", "latest"),
        "training.steps": TIMED_STEPS,
        "training.evaluation_interval": 0,
        "optimizer.learning_rate": 1e-6,
        "parallelism.expert": NODES * cluster.ranks_per_node,
        "parallelism.shard": "false",
        "comm.algorithm": cluster.algorithm,
        "checkpoint.interval": 0,
        "metrics.report": "false",
        "metrics.sample_tokens": 0,
        **(settings or {}),
    }
    command = [sys.executable, "-m", "moeport", "emulate", "--nodes", str(NODES)]
    command += ["--ranks-per-node", str(cluster.ranks_per_node), "--inter", cluster.rate, "--", "train", str(file)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} on {cluster.label} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    steps, _ = read_metrics(folder / "metrics.jsonl")
    counted = steps[SKIPPED:]
    found = {
        "step": statistics.median(step.step_time for step in counted),
        "exchange": statistics.median(step.exchange_time for step in counted),
        "between_nodes_mb": statistics.fmean(step.between_nodes_mb for step in counted),
        "local_share": statistics.fmean(step.local_share or 0.0 for step in counted),
    }
    shutil.rmtree(folder)
    write_json(output, found)
    return found
