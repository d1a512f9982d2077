"""Training time of routers on an emulated cluster: LocMoE beside hash and switch, LocMoE+ beside top-k with a capacity.

    python benchmarks/locality.py [--rate 200mbit] [--steps 400] [--algorithm flat] [--set KEY=VALUE ...]

Each config of `configs/routers/` trains on 2 nodes of 2 ranks that share the experts, with links of limited rate, one
run after the other; the first runs again at the end, which shows how far the machine drifted. LocMoE+ has the capacity
of its baseline, and then that which its controller estimates. Needs root, as `moeport emulate` does. Step times are
medians. Time in the all-to-all is what a rank spends in it, waiting for others included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeport.training.metrics import read_metrics

ESTIMATED = "locmoe_plus, estimated capacity"
PAIRS = (("hash", "locmoe"), ("switch", "locmoe"), ("topk_capacity", "locmoe_plus"), ("topk_capacity", ESTIMATED))
"""Baselines, and what the papers hold against them."""
CAPACITY = ("policy=locmoe_plus",)
"""Of the estimated one, see docs/capacity.md."""


@dataclass(frozen=True)
class Run:
    """What one run showed."""

    step: float
    """Seconds, median."""
    exchange: float
    """Seconds of it in the all-to-all, median."""
    between_first: float
    """MB per step between nodes, in the first tenth of the steps."""
    between_last: float
    """The same in the last tenth."""
    loss: float
    """Validation loss at the end."""


def run(name: str, arguments: argparse.Namespace, folder: Path) -> Run:
    """Train a config on the emulated cluster."""
    settings = {
        "run.dir": folder,
        "training.steps": arguments.steps,
        "training.evaluation_interval": 0,
        "parallelism.expert": 4,
        "parallelism.shard": "false",
        "comm.algorithm": arguments.algorithm,
        "checkpoint.interval": 0,
        "metrics.report": "false",
    }
    command = [sys.executable, "-m", "moeport", "emulate", "--nodes", "2", "--ranks-per-node", "2"]
    command += ["--inter", arguments.rate, "--", "train", f"configs/routers/{name.split(',')[0]}.yaml"]
    overrides = [f"{key}={value}" for key, value in settings.items()] + arguments.set
    if name == ESTIMATED:
        overrides += [f"model.moe.capacity.{setting}" for setting in CAPACITY]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    steps, evaluations = read_metrics(folder / "metrics.jsonl")
    tenth = max(1, len(steps) // 10)
    between = [record.between_nodes_mb for record in steps]
    return Run(
        step=float(np.median([record.step_time for record in steps[1:]])),
        exchange=float(np.median([record.exchange_time for record in steps[1:]])),
        between_first=float(np.mean(between[:tenth])),
        between_last=float(np.mean(between[-tenth:])),
        loss=evaluations[-1].val_loss,
    )


def main() -> None:
    """Run all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="200mbit", help="of each node's link")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--algorithm", default="flat", choices=("flat", "hierarchical", "node_dedup"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every config")
    parser.add_argument("--only", choices=[pair[1] for pair in PAIRS], action="append", help="against its baselines")
    arguments = parser.parse_args()
    pairs = [pair for pair in PAIRS if not arguments.only or pair[1] in arguments.only]
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    found: dict[str, Run] = {}
    print(
        "| config | step, s | all-to-all, s | share | MB between nodes per step, first tenth | last tenth | val. loss |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate([*names, names[0]]):
            result = run(name, arguments, Path(folder) / str(number))
            label = f"{name}, again" if name in found else name
            found.setdefault(name, result)
            print(
                f"| {label} | {result.step:.3f} | {result.exchange:.3f} | {result.exchange / result.step:.0%} | "
                f"{result.between_first:.2f} | {result.between_last:.2f} | {result.loss:.4f} |",
                flush=True,
            )
    print("\n| | baseline | step time | all-to-all | val. loss |\n|---|---|--:|--:|--:|")
    for baseline, name in pairs:
        one, other = found[baseline], found[name]
        print(
            f"| {name} | {baseline} | {other.step / one.step - 1:+.1%} | {other.exchange / one.exchange - 1:+.1%} | "
            f"{other.loss / one.loss - 1:+.2%} |"
        )


if __name__ == "__main__":
    main()
