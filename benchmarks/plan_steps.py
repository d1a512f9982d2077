"""Times of whole training steps that `moeport plan` predicts, against those measured on emulated clusters.

    python benchmarks/plan_steps.py [--rounds 2] [--keep FOLDER]

Needs root: it runs `moeport emulate`. Links are fitted to exchanges and all-reduces that `bench comm --backward` times
on the clusters of BENCHED, and compute to the steps of `train` on those of FITTED, all at one rate of the links between
nodes. Both predict the steps of PREDICTED, of which no time was fitted. Where those have another rate the fitted
bandwidth between nodes is taken times the ratio of the rates. All take turns, `--rounds` times; the time of a run is
the median of the steps of all rounds, without the first of each.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from moeport.comm.exchange import EXCHANGES
from moeport.plan.compute import fit_speed
from moeport.plan.cost import Links
from moeport.plan.fit import Sample, fit, read_samples
from moeport.plan.planner import Cluster, Planner
from moeport.plan.routes import routes
from moeport.training.metrics import StepMetrics, read_metrics
from moeport.training.run_dir import METRICS_FILE, read_config

RATE = 300
"""Mbit/s of the fitted clusters' links."""
STEPS, SKIPPED = 13, 3
"""Of each run, and of those the ones at its start that do not count."""
DEADLINE = 300.0
"""Seconds that a run may take."""
WIDTH, VOCABULARY = 128, 257
CONFIG = f"""\
model:
  num_layers: 2
  d_model: {WIDTH}
  attention: {{num_heads: 2}}
  moe: {{num_experts: 24, expert_hidden: 64, router: {{name: hash, top_k: 4}}}}
data:
  source: {{name: files, paths: ["text/*.txt"]}}
  tokenizer: {{name: byte}}
  sequence_length: 128
training: {{steps: 1000, batch_size: 8}}
metrics: {{report: false, tensorboard: false, peak_tflops: 1}}
backend: {{device: cpu}}
"""
"""The text is random, so that the experts of the router `hash` get equally many tokens and the traffic is uniform."""


@dataclass(frozen=True)
class Bench:
    """Exchanges and all-reduces on an emulated cluster."""

    nodes: int
    ranks_per_node: int
    top_k: int = 4

    def __str__(self) -> str:
        return f"bench comm on {self.nodes} x {self.ranks_per_node}, top-{self.top_k}"

    def measure(self, folder: Path, turn: int) -> None:
        """Write the times of one round, unless they are there."""
        if self._file(folder, turn).exists():
            return
        command = ["bench", "comm", "all_reduce", *EXCHANGES, "-b", "256K", "-e", "1M", "-n", "5", "-w", "1"]
        command += ["--backward", "--top-k", str(self.top_k), "--experts", "24", "--width", str(WIDTH)]
        command = _emulated(self.nodes, self.ranks_per_node, RATE, [*command, "--json", str(self._file(folder, turn))])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{self}: exit code {done.returncode}\n{done.stdout}{done.stderr}")

    def samples(self, folder: Path, rounds: int) -> list[Sample]:
        """Medians over the rounds."""
        turns = [read_samples(self._file(folder, turn), routes) for turn in range(rounds)]
        return [
            replace(same[0], seconds=float(np.median([sample.seconds for sample in same])))
            for same in zip(*turns, strict=True)
        ]

    def _file(self, folder: Path, turn: int) -> Path:
        return folder / f"bench-{'-'.join(str(value) for value in vars(self).values())}-{turn}.json"


@dataclass(frozen=True)
class Run:
    """A run of train on an emulated cluster."""

    nodes: int
    ranks_per_node: int
    algorithm: str = "flat"
    expert: int = 4
    """Ranks that share one copy of the experts."""
    rate: int = RATE
    """Mbit/s."""
    sequences: int = 8
    """Of a rank in a step."""
    top_k: int = 4
    experts: int = 24
    shard: bool = False
    router: str = "hash"
    chunks: int = 1

    def __str__(self) -> str:
        words = [f"{self.nodes} x {self.ranks_per_node}, {self.rate} Mbit/s"]
        words += [self.algorithm if self.expert > 1 else "no exchange", f"experts over {self.expert}"]
        words += [f"{self.router} top-{self.top_k} of {self.experts}", f"{self.sequences} sequences per rank"]
        words += ["sharded"] * self.shard + [f"{self.chunks} chunks"] * (self.chunks > 1)
        return ", ".join(words)

    def measure(self, folder: Path, turn: int) -> None:
        """Train until enough steps are written, unless they are there."""
        there = self._folder(folder, turn)
        if len(_steps(there)) >= STEPS:
            return
        settings = {
            "run.dir": there,
            "training.batch_size": self.sequences * self.nodes * self.ranks_per_node,
            "parallelism.expert": self.expert,
            "parallelism.shard": str(self.shard).lower(),
            "comm.algorithm": self.algorithm,
            "comm.chunks": self.chunks,
            "model.moe.num_experts": self.experts,
            "model.moe.router.name": self.router,
            "model.moe.router.top_k": self.top_k,
        }
        command = _emulated(self.nodes, self.ranks_per_node, self.rate, ["train", str(folder / "config.yaml")])
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
            until = time.monotonic() + DEADLINE
            while len(_steps(there)) < STEPS and process.poll() is None and time.monotonic() < until:
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            process.wait()
            log.seek(0)
            if len(_steps(there)) < STEPS:
                sys.exit(f"{self}: less than {STEPS} steps\n{log.read()}")

    def seconds(self, folder: Path, rounds: int, name: str = "step_time") -> float:
        """Median of a step or of another time of it."""
        found = [getattr(step, name) for turn in range(rounds) for step in _steps(self._folder(folder, turn))[SKIPPED:]]
        return float(np.median(found))

    def planner(self, folder: Path, links: Links) -> Planner:
        """The planner of this run on links of the fitted rate."""
        here = replace(links, inter=links.inter.at(links.inter.bandwidth * self.rate / RATE))
        cluster = Cluster(self.nodes, self.ranks_per_node, here, "cluster")
        return Planner(read_config(self._folder(folder, 0)), VOCABULARY, cluster, partial(routes, "uniform"))

    def _folder(self, folder: Path, turn: int) -> Path:
        return folder / f"run-{'-'.join(str(value) for value in vars(self).values())}-{turn}"


def _steps(folder: Path) -> list[StepMetrics]:
    file = folder / METRICS_FILE
    return read_metrics(file)[0][:STEPS] if file.exists() else []


def _emulated(nodes: int, ranks_per_node: int, rate: int, command: list[str]) -> list[str]:
    cluster = ["--nodes", str(nodes), "--ranks-per-node", str(ranks_per_node), "--inter", f"{rate}mbit"]
    return [sys.executable, "-m", "moeport", "emulate", *cluster, "--", *command]


BENCHED = (Bench(2, 1), Bench(2, 2), Bench(2, 2, top_k=2), Bench(2, 4), Bench(4, 1))
FITTED = (
    Run(2, 2),
    Run(2, 2, sequences=12, top_k=2),
    Run(2, 1, expert=1),
    Run(4, 1, sequences=4),
)
PREDICTED = (
    Run(3, 1, rate=200, expert=3),
    Run(5, 1, expert=5, top_k=3, experts=30, sequences=6),
    Run(2, 3, "node_dedup", rate=200, expert=6),
    Run(3, 2, "hierarchical", rate=400, expert=6, top_k=3),
    Run(3, 2, "node_dedup", expert=6, experts=48, sequences=6),
    Run(4, 2, rate=500, sequences=4),
    Run(6, 1, "node_dedup", expert=6, top_k=6, sequences=4),
    Run(2, 1, rate=200, expert=2),
    Run(2, 2, "node_dedup", rate=150, top_k=6),
    Run(2, 2, "hierarchical", expert=2),
    Run(2, 4, "hierarchical", rate=500, expert=8, top_k=3, sequences=4),
    Run(2, 3, rate=400, expert=6, sequences=6, shard=True),
    Run(3, 2, rate=400, expert=6, sequences=6, router="topk"),
    Run(2, 3, rate=400, expert=6, chunks=2),
)


def main() -> None:
    """Measure, fit, predict and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for all files; what is there counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)).resolve()
        _write_data(folder)
        for turn in range(args.rounds):
            for shape in (*BENCHED, *FITTED, *PREDICTED):
                print(f"round {turn + 1} of {args.rounds}: {shape}", file=sys.stderr, flush=True)
                shape.measure(folder, turn)
        _report(folder, args.rounds)


def _write_data(folder: Path) -> None:
    """The config, and documents of random characters."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    random = np.random.default_rng(0)
    for number in range(40):
        characters = random.integers(33, 127, 4000, np.uint8)
        (folder / "text" / f"{number}.txt").write_bytes(characters.tobytes())


def _report(folder: Path, rounds: int) -> None:
    fitted = fit([sample for bench in BENCHED for sample in bench.samples(folder, rounds)])
    links, error_S = fitted.links, np.abs(fitted.errors)
    for name, link in vars(links).items():
        print(f"{name}: {link.bandwidth / 1e6:,.1f} MB/s, {link.latency * 1e6:,.2f} us")
    pair, meeting = links.inter.pair_bandwidth, links.inter.meeting_bandwidth
    print(f"inter: a pair of ranks {pair / 1e6:,.1f} MB/s, nodes that meet {meeting / 1e6:,.1f} MB/s")
    print(f"fitted to {len(error_S)} times; median error {np.median(error_S):.0%}, largest {error_S.max():.0%}")
    found = fit_speed([run.planner(folder, links).measured(run.seconds(folder, rounds)) for run in FITTED])
    speed = found.speed
    print(
        f"compute: {speed.flop * 1e12:,.2f} s per TFLOP, {speed.parameter * 1e9:,.2f} ns per parameter, "
        f"{speed.block * 1e3:,.3f} ms per block; largest error of a fitted step {np.abs(found.errors).max():.0%}\n"
    )
    print(
        "| Run | Measured step (ms) | In exchanges (ms) | Predicted (ms) | Exchanges, gradients, compute (ms) | Error |"
    )
    print("|---|---|---|---|---|---|")
    errors = []
    for run in PREDICTED:
        measured, placed = run.seconds(folder, rounds), run.planner(folder, links).place_of_config(speed)
        errors.append(placed.step / measured - 1)
        parts = ", ".join(
            f"{seconds * 1e3:.0f}" for seconds in (placed.exchange, placed.gradients, placed.compute or 0)
        )
        exchange = run.seconds(folder, rounds, "exchange_time")
        print(
            f"| {run} | {measured * 1e3:.0f} | {exchange * 1e3:.0f} | {placed.step * 1e3:.0f} | {parts} | "
            f"{errors[-1]:+.1%} |"
        )
    within = sum(abs(error) <= 0.15 for error in errors)
    print(f"\nWithin 15%: {within} of {len(errors)} runs; median error {np.median(np.abs(errors)):.1%}.")


if __name__ == "__main__":
    main()
