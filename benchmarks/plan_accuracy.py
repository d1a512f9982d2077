"""Times of expert exchanges that `moeport plan` predicts, against those measured on emulated clusters.

    python benchmarks/plan_accuracy.py [--rounds 3] [--keep FOLDER]

Needs root: it runs `moeport emulate -- bench comm`. The links are fitted to the clusters of FITTED, all at one rate of
the links between nodes, and predict those of PREDICTED, of which no time was fitted. Where those have another rate the
fitted bandwidth between nodes is taken times the ratio of the rates. All clusters run in turn, `--rounds` times; the
median over the rounds of each exchange's time counts, for the fit too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moeport.comm.exchange import EXCHANGES
from moeport.plan.fit import Sample, fit, read_samples
from moeport.plan.layer import fastest
from moeport.plan.routes import routes

SIZES = {"256K": 1 << 18, "1M": 1 << 20}
"""Tokens of a rank, in bytes."""
RATE = 200
"""Mbit/s of the fitted clusters' links."""


@dataclass(frozen=True)
class Shape:
    """An emulated cluster and the exchanges on it."""

    nodes: int
    ranks_per_node: int
    rate: int = RATE
    """Mbit/s."""
    top_k: int = 8
    experts: int = 64
    traffic: str = "uniform"
    width: int = 256

    def __str__(self) -> str:
        """All that differs between shapes."""
        words = f"{self.nodes} x {self.ranks_per_node}, {self.rate} Mbit/s, top-{self.top_k} of {self.experts}"
        return f"{words}, {self.traffic}, width {self.width}"

    def file(self, folder: Path, turn: int) -> Path:
        """Where the times of one round are kept."""
        return folder / f"{'-'.join(str(value) for value in vars(self).values())}-{turn}.json"

    def measure(self, file: Path) -> None:
        """Write the times to a file."""
        command = [sys.executable, "-m", "moeport", "emulate", "--nodes", str(self.nodes)]
        command += ["--ranks-per-node", str(self.ranks_per_node), "--inter", f"{self.rate}mbit", "--"]
        command += ["bench", "comm", *EXCHANGES, "-b", "256K", "-e", "1M", "-n", "5", "-w", "1"]
        command += ["--top-k", str(self.top_k), "--experts", str(self.experts), "--traffic", self.traffic]
        command += ["--width", str(self.width), "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{self}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


FITTED = (
    Shape(2, 1, top_k=4, experts=32),
    Shape(2, 2),
    Shape(2, 2, top_k=2),
    Shape(2, 4, top_k=4),
    Shape(4, 1),
)
PREDICTED = (
    Shape(3, 1, top_k=2, experts=48),
    Shape(2, 1, rate=100, top_k=4, experts=32),
    Shape(2, 3, top_k=6, experts=48),
    Shape(3, 2, rate=300, experts=96),
    Shape(4, 2, top_k=4),
    Shape(2, 2, rate=500),
    Shape(2, 2, rate=100, top_k=4, traffic="local:0.8"),
    Shape(2, 2, rate=400, width=512, top_k=6),
    Shape(2, 4, rate=400, top_k=2),
    Shape(4, 1, rate=150, top_k=2, experts=32),
    Shape(3, 2, rate=150, top_k=3, experts=48, traffic="local:0.5"),
    Shape(2, 2, rate=300, top_k=4, traffic="zipf"),
)


def main() -> None:
    """Measure, fit, predict and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder for the files of bench comm; those that are there count")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        measured = _measured(folder, args.rounds)
    fitted = fit([sample for shape in FITTED for sample in measured[shape]])
    links, error_S = fitted.links, np.abs(fitted.errors)
    for name, link in vars(links).items():
        print(f"{name}: {link.bandwidth / 1e6:,.1f} MB/s, {link.latency * 1e6:,.2f} us")
    pair, meeting = links.inter.pair_bandwidth, links.inter.meeting_bandwidth
    print(f"inter: a pair of ranks {pair / 1e6:,.1f} MB/s, nodes that meet {meeting / 1e6:,.1f} MB/s")
    print(f"fitted to {len(error_S)} exchanges: median error {np.median(error_S):.0%}, largest {error_S.max():.0%}\n")
    print("| Cluster | Tokens of a rank | Algorithm | Measured (ms) | Predicted (ms) | Error |")
    print("|---|---|---|---|---|---|")
    error = {}
    regret = []
    for shape in PREDICTED:
        here = replace(links, inter=links.inter.at(links.inter.bandwidth * shape.rate / RATE))
        for size in SIZES:
            samples = {each.algorithm: each for each in measured[shape] if _bytes(each) == SIZES[size]}
            costs = {name: here.cost(sample.loads) for name, sample in samples.items()}
            best = min(sample.seconds for sample in samples.values())
            regret.append(samples[fastest(costs)].seconds / best - 1)
            for name, sample in samples.items():
                predicted = costs[name].total
                error[shape, size, name] = predicted / sample.seconds - 1
                print(
                    f"| {shape} | {size}iB | {name} | {sample.seconds * 1e3:.1f} | {predicted * 1e3:.1f} | "
                    f"{error[shape, size, name]:+.1%} |"
                )
    print(f"\n| Cluster | {' | '.join(f'Largest error, {size}iB per rank' for size in SIZES)} |")
    print("|---|---|---|")
    largest = {
        (shape, size): max(abs(error[shape, size, name]) for name in EXCHANGES) for shape in PREDICTED for size in SIZES
    }
    for shape in PREDICTED:
        print(f"| {shape} | {' | '.join(f'{largest[shape, size]:.1%}' for size in SIZES)} |")
    for size in SIZES:
        every = np.abs([value for (_, other, _), value in error.items() if other == size])
        within = sum(largest[shape, size] <= 0.15 for shape in PREDICTED)
        print(
            f"\n{size}iB of tokens per rank: all three algorithms within 15% on {within} of {len(PREDICTED)} clusters; "
            f"{(every <= 0.15).sum()} of {len(every)} exchanges, median error {np.median(every):.1%}."
        )
    print(
        f"\nThe algorithm predicted to be fastest was the fastest in {regret.count(0.0)} of {len(regret)}, and took "
        f"{max(regret):.0%} longer than the fastest at most."
    )


def _bytes(sample: Sample) -> int:
    assert sample.demand is not None
    return sample.demand.tokens * sample.demand.row_bytes


def _measured(folder: Path, rounds: int) -> dict[Shape, list[Sample]]:
    """Exchanges of each shape, with the median over the rounds as their time."""
    shapes = (*FITTED, *PREDICTED)
    for turn in range(rounds):
        for shape in shapes:
            file = shape.file(folder, turn)
            if not file.exists():
                print(f"round {turn + 1} of {rounds}: {shape}", file=sys.stderr, flush=True)
                shape.measure(file)
    found = {}
    for shape in shapes:
        turns = [read_samples(shape.file(folder, turn), routes) for turn in range(rounds)]
        found[shape] = [
            replace(same[0], seconds=float(np.median([sample.seconds for sample in same])))
            for same in zip(*turns, strict=True)
        ]
    return found


if __name__ == "__main__":
    main()
