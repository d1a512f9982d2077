"""Muon against AdamW on the quickstart's model: validation loss at several learning rates, and the time of a step.

    python -m benchmarks.muon [--steps 200] [--seeds 3] [--set KEY=VALUE ...]
    python -m benchmarks.muon --time

Of each optimiser all rates are tried with the first seed, and the best one with the others. Weight decay, warm-up and
schedule are the same for both; the schedule ends with the last step. `--time` interleaves steps of both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from moeport.backends import get_backend
from moeport.comm.mesh import single_mesh
from moeport.config import load_config
from moeport.training.evaluate import evaluate
from moeport.training.prepare import PreparedRun, prepare

CONFIG = Path("configs/quickstart.yaml")
OPTIMIZERS, RATES = ("adamw", "muon"), (0.005, 0.01, 0.02)
VALIDATION_BATCHES = 32


def prepared(name: str, rate: float, steps: int, seed: int, overrides: Sequence[str]) -> PreparedRun:
    """The quickstart at its first step."""
    own = [f"optimizer.name={name}", f"optimizer.learning_rate={rate}", f"training.steps={steps}"]
    own += [f"training.seed={seed}", f"optimizer.schedule.warmup_steps={steps // 20}", "metrics.peak_tflops=1"]
    config = load_config(CONFIG, [*own, *overrides])
    backend = get_backend(config.backend)
    return prepare(config, None, backend, single_mesh(backend.ops), lambda line: None)


def validation_loss(run: PreparedRun) -> float:
    """On the first batches of the validation set."""
    task: Any = run.task
    some = islice(task.data.validation.windows(run.config.training.batch_size), VALIDATION_BATCHES)
    return evaluate(run.mesh.world, run.trainer.model, some, 1).loss


def trained(name: str, rate: float, steps: int, seed: int, overrides: Sequence[str]) -> float:
    """Validation loss after the last step."""
    run = prepared(name, rate, steps, seed, overrides)
    for _ in range(steps):
        run.trainer.step()
    return validation_loss(run)


def losses(steps: int, seeds: int, overrides: Sequence[str]) -> None:
    """A row for each optimiser."""
    rates = " | ".join(f"{rate:g}" for rate in RATES)
    print(f"| Optimiser | {rates} | best rate, {seeds} seeds |\n|---|{'--:|' * (len(RATES) + 1)}")
    for name in OPTIMIZERS:
        first = {rate: trained(name, rate, steps, 0, overrides) for rate in RATES}
        best = min(first, key=lambda rate: first[rate])
        found = [first[best], *(trained(name, best, steps, seed, overrides) for seed in range(1, seeds))]
        shown = " | ".join(f"{loss:.3f}" for loss in first.values())
        print(f"| {name} | {shown} | {np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f}) |", flush=True)


def times(steps: int, overrides: Sequence[str]) -> None:
    """Seconds of steps, and of updates alone, taken in turn."""
    runs = {name: prepared(name, 0.01, 10 * steps, 0, overrides) for name in OPTIMIZERS}
    whole: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    update: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for run_name, run in runs.items():
        model: Any = run.trainer.model

        def timed(rate: float, norm: Any, own: Any = model.step, name: str = run_name) -> None:
            started = time.perf_counter()
            own(rate, norm)
            update[name].append(time.perf_counter() - started)

        model.step = timed
    for _ in range(steps):
        for name, run in runs.items():
            started = time.perf_counter()
            run.trainer.step()
            whole[name].append(time.perf_counter() - started)
    print("| Optimiser | Step, ms | of it the update, ms |\n|---|--:|--:|")
    for name in OPTIMIZERS:
        print(f"| {name} | {1e3 * median(whole[name]):.1f} | {1e3 * median(update[name]):.1f} |")
    ratios = np.array(whole["muon"]) / np.array(whole["adamw"])
    print(f"\nA step of Muon takes {np.median(ratios):.2f} times as long (median of {steps} pairs).")


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--time", action="store_true", help="the time of a step alone")
    args = parser.parse_args()
    if args.time:
        times(args.steps, args.set)
    else:
        losses(args.steps, args.seeds, args.set)


if __name__ == "__main__":
    main()
