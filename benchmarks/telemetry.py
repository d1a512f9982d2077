"""What counting the routers' choices costs: a config trained with and without it, in turns.

    python benchmarks/telemetry.py [CONFIG] [--rounds 30] [--interval 10] [--set KEY=VALUE ...]

Both runs are prepared as `moeport train` prepares them and take the same steps of the same text. A round is as many
steps of each as lie between two counted ones, so that one of them is counted, in alternating order. Printed are the
medians of a round's ratio, counted to not counted, with its quartiles: by the clock, and by the time that this process
computed, which other processes disturb less; then what one count and one write of routing.json take. Nothing is written
but a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moeport.backends import get_backend
from moeport.comm.mesh import Mesh
from moeport.config import load_config
from moeport.training.prepare import PreparedRun, prepare
from moeport.training.routing_counts import RoutingCounts
from moeport.training.routing_log import RoutingLog


class TimedCounts(RoutingCounts):
    """Counts, and how long each took."""

    def __init__(self, counts: RoutingCounts):
        super().__init__(counts.ids, counts.layers, counts.experts, counts.interval)
        self.took: list[tuple[float, float]] = []

    def add(self, parts: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]]) -> None:
        """Also takes the time."""
        self.took.append(seconds(lambda: super(TimedCounts, self).add(parts)))


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--interval", type=int, default=10, help="metrics.routing_interval")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.rounds < 2 or given.interval < 1:
        parser.error("expected at least 2 --rounds and an --interval of at least 1")
    plain, counting = (
        load_config(given.config, [*given.set, f"metrics.routing_interval={n}"]) for n in (0, given.interval)
    )
    backend = get_backend(plain.backend)
    with backend.communicator(None) as world, tempfile.TemporaryDirectory() as folder:
        mesh = Mesh(world, 1)
        runs = {name: prepare(each, None, backend, mesh, print) for name, each in (("off", plain), ("on", counting))}
        found = runs["on"].trainer.counts
        assert found is not None
        counts = runs["on"].trainer.counts = TimedCounts(found)
        ratios, plain_steps = compare(runs, given.rounds, given.interval)
        log = RoutingLog(Path(folder), world, counts, counting.training.steps, 0)
        writes = [seconds(partial(log.write, step))[0] for step in range(1, 6)]
    for clock, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{clock:8} ratio {middle:.4f}, quartiles {low:.4f} to {high:.4f}, over {len(values)} rounds")
    for clock, took, steps in zip(ratios, zip(*counts.took, strict=True), zip(*plain_steps, strict=True), strict=True):
        one, step = statistics.median(took), statistics.median(steps)
        share = one / given.interval / step
        print(
            f"a count  {1e3 * one:.3f} ms ({clock}), one in {given.interval} steps of {1e3 * step:.1f} ms: {share:.3%}"
        )
    print(f"a write  {1e3 * statistics.median(writes):.2f} ms, at the end of a stretch and before a checkpoint")


def compare(
    runs: dict[str, PreparedRun], rounds: int, interval: int
) -> tuple[dict[str, list[float]], list[tuple[float, float]]]:
    """All rounds but the first, which warms up: their ratios by clock, and the seconds of a step without counts."""
    ratios: dict[str, list[float]] = {"wall": [], "process": []}
    steps = []
    for number in range(rounds + 1):
        found = {}
        for name in sorted(runs, reverse=number % 2 == 1):
            found[name] = seconds(partial(take, runs[name], interval))
        if number:
            steps.append((found["off"][0] / interval, found["off"][1] / interval))
            for place, values in enumerate(ratios.values()):
                values.append(found["on"][place] / found["off"][place])
    return ratios, steps


def take(run: PreparedRun, steps: int) -> None:
    """Take the next steps of a run."""
    for _ in range(steps):
        run.trainer.step()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """How long something takes by the clock, and how long this process computes."""
    started = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started[0], time.process_time() - started[1]


if __name__ == "__main__":
    main()
