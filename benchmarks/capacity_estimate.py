"""Whether the estimated capacity of LocMoE+ falls as training proceeds: estimates on held-out text, step by step.

    python -m benchmarks.capacity_estimate [--steps 300] [--seeds 3] [--every 100] [--config FILE ...]

Each config is trained on one thread; every seed has its own initial weights and batches. At step 0 and every `--every`
steps, a few batches of held-out text, each as large as a training batch, pass through the model, and each router
reports the capacity that its tokens call for, as a multiple of T / E:

- `own`: its own tokens, which is what perfectly gathered tokens call for. More than 1, since each expert counts by its
  number of tokens and some have many;
- `rivals` and `minimum`: own tokens to be kept and their rivals, with a tenth of the own tokens given up, and none;
- `2 s q`: the rule `controller`, with a tenth given up;
- `before, mean` and `before, 0.9`: twice the tokens above the mean, and above the 0.9 quantile, own tokens included, as
  versions before the rule `rivals` had it.

Controls pass through the same router: `shuffled`, where each feature is dealt anew among the tokens, so that features
keep their values and lose what they have to do with each other; and `isotropic`, random directions with the tokens'
lengths. What falls for these too is not due to tokens that gather.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from moeport.backends import get_backend
from moeport.comm.mesh import single_mesh
from moeport.config import load_config
from moeport.config.model import CapacityConfig
from moeport.model.capacity import Estimate, affinity_statistics, estimate_from
from moeport.training.evaluate import evaluate
from moeport.training.prepare import PreparedRun, prepare

CONFIGS = ("configs/routers/locmoe_plus.yaml", "configs/quickstart.yaml")
BATCHES = 4
"""Batches of held-out text per measurement."""
_LOW = CapacityConfig(policy="locmoe_plus", delta="quantile", quantile=0.1)
_ALL = CapacityConfig(policy="locmoe_plus", delta="minimum")
_HIGH = CapacityConfig(policy="locmoe", delta="quantile", quantile=0.9)
ESTIMATES: dict[str, tuple[CapacityConfig, Callable[[Estimate], float]]] = {
    "own": (_ALL, lambda found: found.kept),
    "rivals": (_LOW, lambda found: found.kept + found.rivals),
    "minimum": (_ALL, lambda found: found.kept + found.rivals),
    "2 s q": (_LOW, lambda found: 2 * found.rivals),
    "before, mean": (CapacityConfig(policy="locmoe", delta="mean"), lambda found: 2 * (found.kept + found.rivals)),
    "before, 0.9": (_HIGH, lambda found: 2 * (found.kept + found.rivals)),
}
Sums = dict[tuple[str, str, str], np.ndarray]
"""Statistics by layer, kind of tokens and estimate, each over all batches."""


def shuffled(x_TD: Tensor, random: torch.Generator) -> Tensor:
    """The same features, each dealt anew among the tokens."""
    return x_TD.gather(0, torch.rand(x_TD.shape, generator=random).argsort(0))


def isotropic(x_TD: Tensor, random: torch.Generator) -> Tensor:
    """Random directions with the tokens' lengths."""
    noise_TD = torch.randn(x_TD.shape, generator=random)
    return (noise_TD * (x_TD.float().norm(dim=1) / noise_TD.norm(dim=1))[:, None]).to(x_TD.dtype)


KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "tokens": lambda x_TD, _: x_TD,
    "shuffled": shuffled,
    "isotropic": isotropic,
}


def measuring(name: str, router: Any, sums: Sums, random: torch.Generator) -> Callable[..., Any]:
    """The router's `route`, which also adds the statistics of its tokens and of the controls."""
    route = router.route

    def measured(ops: Any, params: Any, x_TD: Tensor, context: Any) -> Any:
        for kind, made in KINDS.items():
            y_TD = made(x_TD, random)
            routing, cosine_TE = route(ops, params, y_TD, context), router.gate_cosines(ops, params, y_TD)
            for estimate, (capacity, _) in ESTIMATES.items():
                found_4E = affinity_statistics(ops, capacity, cosine_TE, routing)
                sums[name, kind, estimate] = sums[name, kind, estimate] + ops.to_numpy(found_4E).astype(np.float64)
        return route(ops, params, x_TD, context)

    return measured


def estimates(run: PreparedRun) -> dict[tuple[str, str, str], float]:
    """Capacities on held-out text as multiples of T / E, by layer, kind of tokens and estimate."""
    sums: Sums = defaultdict(lambda: np.zeros(()))
    random = torch.Generator().manual_seed(0)
    held_out: Any = run.task
    batch = run.config.training.batch_size
    with ExitStack() as stack:
        for name, layer in run.trainer.shapes.moe_layers.items():
            stack.enter_context(mock.patch.object(layer.router, "route", measuring(name, layer.router, sums, random)))
        evaluate(run.mesh.world, run.trainer.model, islice(held_out.data.validation.windows(batch), BATCHES), 1)
    share = run.trainer.tokens_per_step / run.config.model.moe.num_experts
    found = {}
    for key, sum_4E in sums.items():
        estimate = estimate_from(sum_4E)
        assert estimate is not None
        found[key] = ESTIMATES[key[2]][1](estimate) / share
    return found


def trained(file: str, seed: int, steps: int, every: int) -> dict[int, dict[tuple[str, str, str], float]]:
    """Estimates by number of steps."""
    settings = (f"training.seed={seed}", f"training.steps={steps}", "backend.device=cpu", "backend.dtype=float32")
    config = load_config(file, [*settings, "metrics.peak_tflops=1"])
    backend = get_backend(config.backend)
    run = prepare(config, None, backend, single_mesh(backend.ops), lambda line: None)
    found = {0: estimates(run)}
    for step in range(1, steps + 1):
        run.trainer.step()
        if step % every == 0:
            found[step] = estimates(run)
    return found


def spread(values: list[float]) -> str:
    """Mean (lowest to highest)."""
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def tables(file: str, runs: list[dict[int, dict[tuple[str, str, str], float]]]) -> None:
    """Estimates by layer over the steps, and at the beginning and the end against controls."""
    steps, layers = list(runs[0]), sorted({key[0] for key in runs[0][0]})
    print(f"\n{file}, capacity over T / E, mean (lowest to highest) of {len(runs)} seeds\n")
    for estimate in ESTIMATES:
        print(f"| {estimate} | {' | '.join(f'step {step}' for step in steps)} |\n|---|{'--:|' * len(steps)}")
        for layer in layers:
            cells = [spread([run[step][layer, "tokens", estimate] for run in runs]) for step in steps]
            print(f"| {layer} | {' | '.join(cells)} |")
        print()
    print("| mean of the layers | " + " | ".join(f"{kind}, {at}" for kind in KINDS for at in ("start", "end")) + " |")
    print(f"|---|{'--:|' * 2 * len(KINDS)}")
    for estimate in ESTIMATES:
        cells = []
        for kind in KINDS:
            for step in (steps[0], steps[-1]):
                cells.append(spread([float(np.mean([run[step][x, kind, estimate] for x in layers])) for run in runs]))
        print(f"| {estimate} | {' | '.join(cells)} |")


def main() -> None:
    """Run all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=100, metavar="STEPS", help="between measurements")
    parser.add_argument("--config", action="append", metavar="FILE", help=f"default: {' and '.join(CONFIGS)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for file in arguments.config or CONFIGS:
        tables(file, [trained(file, seed, arguments.steps, arguments.every) for seed in range(arguments.seeds)])


if __name__ == "__main__":
    main()
