"""What experiment trackers take, offline: time of the training thread, and of this process beside it.

    python benchmarks/trackers.py [--names tensorboard,wandb,mlflow] [--rows 200] [--tags 60] [--rounds 3]

A tracker that is ready gets rows of as many tags, one after the other. Printed per row, as medians over the rounds: the
CPU time that handing it over takes in the calling thread, which is all that a step waits for, and the CPU time of the
whole process until the tracker has closed, most of it in the tracker's own thread. CPU time, since other processes on
the machine disturb it least.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from moeport.config import config_from_dict
from moeport.training.trackers.tracking import RUN_FILE, TRACKERS_DIR, Trackers, open_trackers


def main() -> None:
    """Print a line for each tracker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="tensorboard")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tags", type=int, default=60, help="values of a row")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for name in given.names.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = [
                measured(name, Path(folder) / str(number), given.rows, given.tags) for number in range(given.rounds)
            ]
        handing_over, whole = (statistics.median(each) / given.rows for each in zip(*found, strict=True))
        print(f"{name:12s} {handing_over * 1e6:6.1f} us per row to hand over, {whole * 1e3:6.2f} ms with the client")


def measured(name: str, run_dir: Path, rows: int, tags: int) -> tuple[float, float]:
    """CPU seconds of handing over all rows, and of the process until they have been taken."""
    trackers, spent = ready(name, run_dir), 0.0
    before = time.process_time()
    with trackers:
        for number in range(1, rows + 1):
            values = {f"moe/load/{tag}": number * 0.5 + tag for tag in range(tags)}
            started = time.thread_time()
            trackers.log(number, values)
            spent += time.thread_time() - started
    return spent, time.process_time() - before


def ready(name: str, run_dir: Path) -> Trackers:
    """A tracker that waits for its first row."""
    listed = [] if name == "tensorboard" else [{"name": name}]
    config = config_from_dict({"metrics": {"tensorboard": not listed, "trackers": listed}})
    trackers = open_trackers(run_dir, config, 0)
    while listed and not (run_dir / TRACKERS_DIR / name / RUN_FILE).exists():
        time.sleep(0.1)
    return trackers


if __name__ == "__main__":
    main()
