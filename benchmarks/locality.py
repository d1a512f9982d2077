"""LocMoE's headline: is training shorter at the same loss where each node trains on text of its own?

    python benchmarks/locality.py [--output runs/locality] [--steps 600] [--seeds 0,1,2] [--only losses|times]

Two nodes, of which one trains on Python and the other on C++. First every config is trained in one process that
simulates both nodes, with every seed, as `moeport compare` does: loss, and share of choices on the token's own node.
Then the trained models take steps on emulated clusters of 2 x 1 and 2 x 2 ranks, on links whose rate makes the
all-to-all 18% to 30% of a Switch step, as in the paper. Their weights hardly move meanwhile. The configs take turns,
in an order that each round rotates. `rre` by domain sends every token to an expert of its own node: the bound.

Repeated, the command goes on where it was. Needs root for the clusters, as `moeport emulate` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml
from emulated import NODES, Cluster, timed

from moeport.files import write_json
from moeport.pages.console import PlainConsole
from moeport.studies.compare.compare import compare
from moeport.studies.compare.page import write_page
from moeport.studies.compare.plan import plan
from moeport.studies.compare.table import markdown
from moeport.training.metrics import read_metrics

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "routers"
COEFFICIENTS = (0.01, 0.03, 0.1)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hash": ("hash", {}),
    "switch": ("switch", {}),
    "rre-domain": ("rre", {"groups": 2, "group_by": "domain"}),
    **{f"locmoe-{value}": ("locmoe", {"locality_coefficient": value}) for value in COEFFICIENTS},
}
"""By name, a config of `configs/routers` and what differs in its router."""
BASELINES = {"hash": 0.1268, "switch": 0.2224}
"""What LocMoE saves of their steps, as its paper reports."""
LOSS_LIMIT = 0.01
"""Largest relative increase of the loss at which a saving counts."""
REAL_NODES = {"model.moe.router.nodes": "null"}
"""On a cluster the nodes are its own, not simulated in one process."""
LAST_STEPS = 50
"""Over which the local share at the end of training is averaged."""


def clusters(rates: dict[int, str]) -> list[Cluster]:
    """All that are timed; nodes of one rank have nothing to gain from the other algorithms."""
    algorithms = {1: ("flat",), 2: ("flat", "hierarchical", "node_dedup")}
    return [Cluster(ranks, name, rates[ranks]) for ranks, names in algorithms.items() for name in names]


def write_configs(folder: Path) -> dict[str, Path]:
    """The config of each variant, as a file."""
    headers = Path(torch.__file__).parent / "include"
    files = {}
    for name, (base, router) in VARIANTS.items():
        config = yaml.safe_load((CONFIGS / f"{base}.yaml").read_text())
        config["run"]["dir"] = str(folder / name)
        config["model"]["moe"]["router"] |= router | {"nodes": NODES}
        del config["data"]["source"]
        config["data"] |= {
            "domains": [
                {"name": "python", "source": {"name": "stdlib"}},
                {
                    "name": "cpp",
                    "source": {
                        "name": "files",
                        "paths": [str(headers / "c10"), str(headers / "torch" / "csrc")],
                        "text_suffixes": [".h"],
                    },
                },
            ],
            "validation_fraction": 0.02,
        }
        config["training"]["evaluation_interval"] = 200
        files[name] = folder / f"{name}.yaml"
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].write_text(yaml.safe_dump(config, sort_keys=False))
    return files


def losses(given: argparse.Namespace, files: dict[str, Path]) -> dict[str, Any]:
    """Train all configs with all seeds; the runs of each, with final loss and local share by seed."""
    overrides = [f"training.steps={given.steps}", *given.set]
    seeds = [int(seed) for seed in given.seeds.split(",")]
    output = given.output / "compare"
    planned = plan(list(files.values()), output, overrides, seeds=seeds, baseline="hash")
    comparison = compare(planned, console=PlainConsole())
    print(markdown(comparison))
    print(f"page: {write_page(comparison, output)}\n")
    comparison.raise_for_problems()
    found: dict[str, Any] = {}
    for name in files:
        runs = planned.of(name)
        metrics = [read_metrics(run.dir / "metrics.jsonl") for run in runs]
        shares = [[step.local_share or 0.0 for step in steps[-LAST_STEPS:]] for steps, _ in metrics]
        found[name] = {
            "run": str(runs[0].dir),
            "loss": [evaluations[-1].val_loss for _, evaluations in metrics],
            "by_domain": [evaluations[-1].val_loss_by_domain for _, evaluations in metrics],
            "local_share": [statistics.fmean(share) for share in shares],
        }
    return found


def print_losses(found: dict[str, Any]) -> None:
    """A table of losses, of their differences from the baselines with the same seed, and of local shares."""
    heads = " | ".join(f"against {name}" for name in BASELINES)
    print(f"| config | val. loss, mean (each seed) | {heads} | local share |")
    print("|---|---|" + "---|" * len(BASELINES) + "---|")
    for name, row in found.items():
        cells = [f"{statistics.fmean(row['loss']):.3f} ({_listed(row['loss'], '.3f')})"]
        for baseline in BASELINES:
            relative = [a / b - 1 for a, b in zip(row["loss"], found[baseline]["loss"], strict=True)]
            cells.append(f"{statistics.fmean(relative):+.2%} ({_listed(relative, '+.2%')})")
        cells.append(f"{statistics.fmean(row['local_share']):.1%} ({_listed(row['local_share'], '.1%')})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(flush=True)


def times(given: argparse.Namespace, files: dict[str, Path], found: dict[str, Any]) -> dict[str, Any]:
    """Time all configs on all clusters, in turns; by cluster and config, what each round gave."""
    rates = {1: given.rates[0], 2: given.rates[1]}
    folder = given.output / "times"
    folder.mkdir(parents=True, exist_ok=True)
    names, rows = list(files), {}
    for cluster in clusters(rates):
        if given.clusters and cluster.label not in given.clusters:
            continue
        row: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(given.rounds):
            shift = 2 * number % len(names)
            for name in names[shift:] + names[:shift]:
                output = folder / f"{cluster.ranks_per_node}-{cluster.algorithm}-{cluster.rate}-{name}-{number}.json"
                if output.exists():
                    result = json.loads(output.read_text())
                else:
                    result = timed(name, files[name], Path(found[name]["run"]), cluster, output, REAL_NODES)
                    print(f"{cluster.label}, round {number + 1}: {name} {result['step']:.3f} s", flush=True)
                row[name].append(result)
        rows[cluster.label] = row
        print_times(cluster.label, row)
    return rows


def print_times(label: str, row: dict[str, list[dict[str, float]]]) -> None:
    """A table of steps on one cluster, relative to the baselines in the same round."""
    heads = " | ".join(f"against {name}" for name in BASELINES)
    print(f"\n{label}\n")
    print(f"| config | step, s, median | all-to-all | {heads} | MB between nodes per step | local share |")
    print("|---|--:|--:|" + "---|" * len(BASELINES) + "--:|--:|")
    for name, rounds in row.items():
        step = statistics.median(each["step"] for each in rounds)
        share = statistics.median(each["exchange"] / each["step"] for each in rounds)
        cells = [f"{step:.3f}", f"{share:.0%}"]
        for baseline in BASELINES:
            relative = [a["step"] / b["step"] - 1 for a, b in zip(rounds, row[baseline], strict=True)]
            cells.append(f"{statistics.median(relative):+.1%} ({_listed(relative, '+.1%')})")
        cells.append(f"{statistics.fmean(each['between_nodes_mb'] for each in rounds):.2f}")
        cells.append(f"{statistics.fmean(each['local_share'] for each in rounds):.1%}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(flush=True)


def print_verdict(found: dict[str, Any], rows: dict[str, Any]) -> None:
    """For each cluster and strength of the locality loss, whether the paper's savings show at the same loss."""
    print("| cluster | config | " + " | ".join(f"saves of a {name} step" for name in BASELINES) + " | loss | shown |")
    print("|---|---|" + "--:|" * len(BASELINES) + "---|---|")
    for label, row in rows.items():
        for name in (name for name in row if name.startswith("locmoe")):
            saved, increases = {}, {}
            for baseline in BASELINES:
                pairs = zip(row[name], row[baseline], strict=True)
                saved[baseline] = 1 - statistics.median(a["step"] / b["step"] for a, b in pairs)
                pairs = zip(found[name]["loss"], found[baseline]["loss"], strict=True)
                increases[baseline] = statistics.fmean(a / b - 1 for a, b in pairs)
            shown = [
                baseline
                for baseline, target in BASELINES.items()
                if saved[baseline] >= target and increases[baseline] <= LOSS_LIMIT
            ]
            cells = [f"{value:.1%}" for value in saved.values()]
            cells.append(", ".join(f"{value:+.2%} against {baseline}" for baseline, value in increases.items()))
            cells.append(f"against {' and '.join(shown)}" if shown else "no")
            print(f"| {label} | {name} | " + " | ".join(cells) + " |")


def _listed(values: list[float], style: str) -> str:
    return ", ".join(format(value, style) for value in values)


def main() -> None:
    """Train, time and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/locality"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every training run")
    parser.add_argument("--rates", nargs=2, default=["100mbit", "200mbit"], help="of a link, for 2 x 1 and 2 x 2 ranks")
    parser.add_argument("--clusters", nargs="+", metavar="LABEL", help='those to time, such as "2 x 1, flat"')
    parser.add_argument("--rounds", type=int, default=3, help="of all configs on a cluster")
    parser.add_argument("--only", choices=("losses", "times"), help="times needs the runs of losses")
    given = parser.parse_args()
    files = write_configs(given.output.resolve() / "configs")
    kept = given.output / "losses.json"
    if given.only != "times":
        found = losses(given, files)
        write_json(kept, found)
    found = json.loads(kept.read_text())
    print_losses(found)
    if given.only == "losses":
        return
    rows = times(given, files, found)
    write_json(given.output / "times.json", rows)
    print_verdict(found, rows)


if __name__ == "__main__":
    main()
