"""Which experts are alive in the first steps of training, and why: small models at the default learning rate.

A router sees the normed residual stream. Its mean over the tokens of a batch is what they have in common; "alike" is
the share of its square in the mean square: 0 if tokens have nothing in common, 1 if all are equal. Once they are alike,
all go to the same experts, whatever the router's own weights do.

    python -m benchmarks.first_steps [--table defaults|causes|widths] [--steps 60] [--seeds 3] [--size NAME]

Every cell trains on the Python standard library's own sources, on one thread, from the same batches for each seed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from moeport.backends import get_backend
from moeport.comm.mesh import single_mesh
from moeport.config import config_from_dict
from moeport.config.schema import Config
from moeport.core.parameters import InitialWeights
from moeport.core.weights import Box
from moeport.training import prepare as preparation
from moeport.training.evaluate import evaluate
from moeport.training.prepare import PreparedRun, prepare

EXPERTS, TOP_K, VALIDATION_BATCHES = 64, 8, 16
SIZES: dict[str, dict[str, Any]] = {
    "D 256, 4 layers": {"d_model": 256, "num_layers": 4, "expert_hidden": 64},
    "D 512, 2 layers": {"d_model": 512, "num_layers": 2, "expert_hidden": 32},
}


@dataclass(frozen=True)
class Variant:
    """What differs from the defaults of a version before `model.embedding_std`, whose embeddings had 0.02."""

    config: Mapping[str, Any] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)
    """Factors of initial weights, by a part of their names."""
    frozen: str | None = None
    """Weights that do not change: a pattern in their names."""
    rate: float = 1.0
    """Factor of the learning rate of the routers."""
    centred: bool = False
    """Take the mean over tokens from what the routers see."""


def optimizer(**options: Any) -> Variant:
    """A variant of the section optimizer."""
    return Variant({"optimizer": options})


BEFORE, AFTER = "embeddings 0.02 (before)", "embeddings 1 (now)"
WARM = {"schedule": {"warmup_steps": 100}}
DEFAULTS = {
    BEFORE: Variant(),
    "the same, 100 steps of warm-up": optimizer(**WARM),
    AFTER: Variant({"model": {"embedding_std": 1.0}}),
}
CAUSES = {
    BEFORE: Variant(),
    "routers frozen": Variant(frozen="router"),
    "only routers train": Variant(frozen="^(?!.*router)"),
    "embeddings, attention and experts frozen": Variant(frozen="embedding|attention|experts"),
    "routers see no mean": Variant(centred=True),
    "attention frozen": Variant(frozen="attention"),
    "experts frozen": Variant(frozen="experts"),
    "embeddings frozen": Variant(frozen="embedding"),
    "embeddings 0.1": Variant({"model": {"embedding_std": 0.1}}),
    AFTER: Variant({"model": {"embedding_std": 1.0}}),
    "router weights / 10": Variant(scale={"router": 0.1}),
    "router weights * 5": Variant(scale={"router": 5.0}),
    "residual outputs / 10": Variant(scale={"attention.out": 0.1, "w_out": 0.1}),
    "learning rate of routers / 10": Variant(rate=0.1),
    "load balance 0": Variant({"model": {"moe": {"load_balance": {"coefficient": 0.0}}}}),
    "load balance 0.1": Variant({"model": {"moe": {"load_balance": {"coefficient": 0.1}}}}),
    "router z-loss 0.001": Variant({"model": {"moe": {"router_z_loss": 0.001}}}),
    "no weight decay": optimizer(weight_decay=0.0),
    "no clipping": optimizer(clip_norm=None),
    "clipping at 0.1": optimizer(clip_norm=0.1),
    "20 steps of warm-up": optimizer(schedule={"warmup_steps": 20}),
    "100 steps of warm-up": optimizer(**WARM),
    "learning rate 3e-4": optimizer(learning_rate=3e-4),
    "learning rate 1e-4": optimizer(learning_rate=1e-4),
}


@dataclass(frozen=True)
class Row:
    """One step, mean over the layers."""

    loss: float
    imbalance: float
    """Load of the busiest expert over the mean; at most EXPERTS / TOP_K."""
    dead: float
    """Experts with less than a hundredth of the mean load."""
    over: float
    """Percentage of the assignments that a capacity factor of 1.25 would drop."""
    alike: float
    rates: float
    """Sum of the learning rates before the step."""


def config_of(size: Mapping[str, Any], variant: Variant, seed: int, batch: int) -> Config:
    """A whole config; 1,000 steps, so that the schedule is that of a longer run."""
    model: dict[str, Any] = {
        "d_model": size["d_model"],
        "num_layers": size["num_layers"],
        "embedding_std": 0.02,
        "attention": {"num_heads": 4},
        "moe": {
            "num_experts": EXPERTS,
            "expert_hidden": size["expert_hidden"],
            "router": {"name": "topk", "top_k": TOP_K},
        },
    }
    values: dict[str, Any] = {
        "model": model,
        "data": {"tokenizer": {"name": "bpe", "vocab_size": 4096}, "sequence_length": 256},
        "training": {"steps": 1000, "batch_size": batch, "seed": seed},
        "backend": {"device": "cpu"},
        "metrics": {"peak_tflops": 1.0},
    }
    return config_from_dict(merged(values, variant.config))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, `over` first."""
    both = {k: merged(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **both}


def prepared(config: Config, variant: Variant) -> PreparedRun:
    """A run at its first step, with scaled initial weights."""

    class Scaled(InitialWeights):
        def read(self, name: str, box: Box) -> np.ndarray:
            values = super().read(name, box)
            for part, factor in variant.scale.items():
                if part in name:
                    values *= np.float32(factor)
            return values

    backend = get_backend(config.backend)
    with mock.patch.object(preparation, "InitialWeights", Scaled):
        return prepare(config, None, backend, single_mesh(backend.ops), lambda line: None)


def watch(run: PreparedRun, variant: Variant) -> dict[str, float]:
    """Let every router say how alike its tokens are; the result is filled in each pass."""
    alike: dict[str, float] = {}
    for name, layer in run.trainer.shapes.moe_layers.items():

        def routed(
            ops: Any, params: Any, x_TD: Tensor, context: Any, name: str = name, route: Any = layer.router.route
        ) -> Any:
            mean_D = x_TD.detach().float().mean(0)
            alike[name] = float(mean_D.square().sum() / x_TD.detach().float().square().sum(1).mean())
            return route(ops, params, x_TD - mean_D if variant.centred else x_TD, context)

        layer.router.route = routed  # type: ignore[method-assign]
    return alike


def restrain(run: PreparedRun, variant: Variant) -> None:
    """Make a step leave frozen weights as they are, and move routers by a part of the way."""
    model: Any = run.trainer.model
    own, frozen = model.step, variant.frozen
    shares = {}
    for name in model.parameters():
        share = 0.0 if frozen and re.search(frozen, name) else variant.rate if ".router." in name else 1.0
        if share != 1.0:
            shares[name] = share

    def step(learning_rate: float, norm: Tensor) -> None:
        before = model.parameters(shares)
        own(learning_rate, norm)
        after = model.parameters(shares)
        model.load_parameters({n: old + np.float32(shares[n]) * (after[n] - old) for n, old in before.items()})

    if shares:
        model.step = step


def trained(size: Mapping[str, Any], variant: Variant, steps: int, seed: int, batch: int) -> tuple[list[Row], float]:
    """The steps, and the loss on a part of the validation set after them."""
    run = prepared(config_of(size, variant, seed, batch), variant)
    alike, rows, rates = watch(run, variant), [], 0.0
    restrain(run, variant)
    for _ in range(steps):
        found = run.trainer.step()
        load_LE = np.array(found.expert_load)
        dead = float((load_LE < 0.01 / EXPERTS).sum(1).mean())
        over = 100 * float(np.maximum(load_LE - 1.25 / EXPERTS, 0).sum(1).mean())
        rows.append(Row(found.loss, found.imbalance, dead, over, float(np.mean(list(alike.values()))), rates))
        rates += found.lr
    windows: Any = run.task
    some = islice(windows.data.validation.windows(batch), VALIDATION_BATCHES)
    return rows, evaluate(run.mesh.world, run.trainer.model, some, 1).loss


def defaults(sizes: Mapping[str, Any], steps: int, seeds: int) -> None:
    """Before and after, with the spread over seeds."""
    print(
        f"| Model | Defaults | Imbalance, mean | largest | Dead experts, mean | most | Drops, % | Loss, step {steps} |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for size, shape in sizes.items():
        for name, variant in DEFAULTS.items():
            runs = [trained(shape, variant, steps, seed, 2) for seed in range(seeds)]
            columns = [
                spread([function([getattr(row, key) for row in rows]) for rows, _ in runs], digits)
                for key, function, digits in (
                    ("imbalance", np.mean, 2),
                    ("imbalance", max, 2),
                    ("dead", np.mean, 1),
                    ("dead", max, 1),
                    ("over", np.mean, 0),
                )
            ]
            columns.append(spread([loss for _, loss in runs], 3))
            print(f"| {size} | {name} | {' | '.join(columns)} |", flush=True)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean (lowest to highest)."""
    shown = [f"{value:.{digits}f}" for value in (float(np.mean(values)), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def causes(sizes: Mapping[str, Any], steps: int, seeds: int) -> None:
    """One factor at a time, first seed, the last step."""
    columns = [f"{size}: {column}" for size in sizes for column in ("alike", "imbalance", "dead")]
    print(f"| Step {steps} | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
    for name, variant in CAUSES.items():
        cells = []
        for shape in sizes.values():
            last = trained(shape, variant, steps, 0, 4)[0][-1]
            cells += [f"{last.alike:.2f}", f"{last.imbalance:.1f}", f"{last.dead:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def widths(sizes: Mapping[str, Any], steps: int, seeds: int) -> None:
    """The sum of learning rates until tokens are half alike: by width, learning rate and embeddings, two layers."""
    print("| D | Learning rate | Warm-up | Embeddings | Steps until half alike | Sum of learning rates |")
    print("|--:|--:|--:|--:|--:|--:|")
    cells = [(width, 3e-4, 0, 0.02) for width in (128, 256, 512, 1024)]
    cells += [(256, 1e-4, 0, 0.02), (256, 1e-3, 0, 0.02), (256, 1e-3, 20, 0.02)]
    cells += [(256, 1e-3, 0, 0.2), (256, 1e-3, 0, 1.0)]
    for width, rate, warm, std in cells:
        options = {"learning_rate": rate, "schedule": {"warmup_steps": warm}}
        variant = Variant({"model": {"embedding_std": std}, "optimizer": options})
        shape = {"d_model": width, "num_layers": 2, "expert_hidden": 32}
        rows, _ = trained(shape, variant, steps, 0, 2)
        half = next(((i, row.rates) for i, row in enumerate(rows) if row.alike > 0.5), None)
        shown = f"{half[0]} | {half[1]:.4f}" if half else f"over {steps} | over {rows[-1].rates:.4f}"
        print(f"| {width} | {rate:g} | {warm} | {std:g} | {shown} |", flush=True)


Table = Callable[[Mapping[str, Any], int, int], None]
TABLES: dict[str, tuple[Table, int]] = {"defaults": (defaults, 60), "causes": (causes, 20), "widths": (widths, 30)}
"""Each with its number of steps."""


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="defaults")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, action="append", help="this size alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, steps = TABLES[args.table]
    table({name: SIZES[name] for name in args.size or SIZES}, args.steps or steps, args.seeds)


if __name__ == "__main__":
    main()
