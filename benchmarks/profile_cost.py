"""What a profile costs: profiled steps and plain ones of one model in turns, and steps whose memory is measured.

`python benchmarks/profile_cost.py [CONFIG] [--rounds 10] [--steps 4] [--dtype float32]` prints the medians in
milliseconds per step, and the ratios to plain steps. Tokens are random; nothing is written but temporary files.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from compiled_step import Subject


def seconds(subject: Subject, number: int, within: AbstractContextManager[None]) -> float:
    """Of one step inside a block, with what the block does before and after it."""
    started = time.perf_counter()
    with within:
        subject.step(number)
    return time.perf_counter() - started


def main() -> None:
    """Print a line per kind of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="of a window")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    subject = Subject(given.config, given.dtype, "topk", compiles=False)
    times: dict[str, list[float]] = {"plain": [], "profiled": [], "memory measured": []}
    for number in range(given.rounds + 1):
        profiler = subject.backend.profiler(subject.model)
        found = {"plain": [seconds(subject, number, nullcontext()) for _ in range(given.steps)]}
        found["memory measured"] = [seconds(subject, number, profiler.memory())]
        found["profiled"] = [seconds(subject, number, profiler.step()) for _ in range(given.steps)]
        with tempfile.TemporaryDirectory() as folder:
            profiler.finish(Path(folder) / "trace")
        for kind in times if number else ():  # the first round warms up
            times[kind].append(statistics.median(found[kind]))
    plain = statistics.median(times["plain"])
    for kind, values in times.items():
        median = statistics.median(values)
        print(f"{kind:16} {1e3 * median:8.1f} ms  ratio {median / plain:.2f}")


if __name__ == "__main__":
    main()
