"""What `comm.algorithm: auto` takes, against the best all-to-all, on emulated clusters.

    python benchmarks/auto_choice.py [--repetitions 9]

Needs root: it runs `moeport emulate -- bench moe`, in which auto chooses for each size and is then measured in turn
with all algorithms, forward and backward. A time is the median of the slowest rank. Where auto takes the algorithm that
is the best of those measured, what is left is the noise of the machine, so the time of what it took is printed twice:
as measured for auto, and as measured for that algorithm by its name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moeport.comm.exchange import EXCHANGES

CLUSTERS = (
    ("2 x 2", "200mbit", ("--top-k", "8", "--experts", "64")),
    ("2 x 2", "200mbit", ("--top-k", "2", "--experts", "8")),
    ("2 x 2", "1gbit", ("--top-k", "8", "--experts", "64")),
    ("2 x 2", "1gbit", ("--top-k", "2", "--experts", "8")),
    ("2 x 1", "200mbit", ("--top-k", "4", "--experts", "16")),
    ("1 x 4", None, ("--top-k", "4", "--experts", "16")),
)
"""Nodes x ranks of each, rate between nodes, shape of the layer."""
SIZES = ("-b", "64K", "-e", "1M", "-f", "4")


def measured(shape: str, rate: str | None, layer: tuple[str, ...], repetitions: int) -> dict[str, Any]:
    """What `bench moe` writes of a cluster."""
    nodes, ranks = shape.split(" x ")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.json"
        command = [sys.executable, "-m", "moeport", "emulate", "--nodes", nodes, "--ranks-per-node", ranks]
        command += ["--inter", rate] if rate else []
        command += ["--", "bench", "moe", *EXCHANGES, "auto", *layer, *SIZES, "-n", str(repetitions), "-w", "1"]
        done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{shape}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def main() -> None:
    """Measure all and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    repetitions = parser.parse_args().repetitions
    names = list(EXCHANGES)
    print(f"| cluster | layer | bytes per rank | {', ms | '.join(names)}, ms | auto, ms | taken / best | auto / best |")
    print(f"|---|---|{'--:|' * (len(names) + 4)}")
    taken_ratios, auto_ratios = [], []
    for shape, rate, layer in CLUSTERS:
        found = measured(shape, rate, layer, repetitions)
        rows = found["rows"]
        for size in dict.fromkeys(row["size"] for row in rows):
            times = {row["algorithm"]: row["time_us"] / 1e3 for row in rows if row["size"] == size}
            auto = times.pop("auto")
            best = min(times.values())
            taken = found["auto"][str(size)]["algorithm"]
            taken_ratios.append(times[taken] / best)
            auto_ratios.append(auto / best)
            words = f"{shape}{f', {rate}' if rate else ''} | top-{layer[1]} of {layer[3]}"
            print(
                f"| {words} | {size:,} | {' | '.join(f'{times[name]:.1f}' for name in names)} | {auto:.1f} ({taken}) | "
                f"{taken_ratios[-1]:.3f} | {auto_ratios[-1]:.3f} |",
                flush=True,
            )
    for words, ratios in (("what auto took, by its name", taken_ratios), ("auto, as measured", auto_ratios)):
        within = sum(ratio <= 1.05 for ratio in ratios)
        print(f"\n{words}: within 5% of the best in {within} of {len(ratios)}, at most {max(ratios):.3f}.")


if __name__ == "__main__":
    main()
