"""AdaMoE's claim: a trained top-2 model with null experts needs fewer experts per token at the same loss.

    python benchmarks/null_experts.py [--output-dir runs/null-experts] [--seeds 0,1,2] [--set KEY=VALUE ...]

Each seed trains a top-2 model, from whose checkpoint all others go on for equally many tokens: with top-2; with top-1;
with null experts, of several numbers and choices (`moeport convert upcycle`); and with rows dropped at random, by
gate-proportional second choices (`gshard`) or a tight capacity. The line between top-1 and top-2 in loss against
rows is what spending one or two experts regardless of the token gives: AdaMoE's claim holds where its loss is below it.
Control: random drops. If they lie below the line too, the line is no baseline.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from claims import (
    RATE,
    Arm,
    Given,
    Report,
    better,
    compared,
    comparisons,
    difference,
    direction,
    mean,
    no_worse,
    options,
    plain,
    shown,
    values,
)

from moeport.convert.upcycle import upcycle
from moeport.convert.upcycle_plan import UpcycleOptions
from moeport.studies.compare.outcome import Comparison
from moeport.studies.compare.plan import PlannedRun

RATE_BEFORE, RATE_AFTER = "0.02", "0.005"
"""Learning rates of the first model, and of all that go on from it."""
NULL = {
    f"adamoe-{top_k}-of-{nulls}": f"model.moe.router={{name: adamoe, top_k: {top_k}, null_experts: {nulls}}}"
    for top_k, nulls in ((3, 4), (3, 8), (4, 16))
}
"""K choices and m null experts; at balance a token uses K * 8 / (8 + m) experts: 2, 1.5 and 1.33."""
PLAIN = {
    "top2": Arm("topk"),
    "top1": Arm("topk", ("model.moe.router.top_k=1",)),
    "gshard": Arm("gshard"),
    "random": Arm("topk_capacity", ("model.moe.capacity.factor=0.75", "model.moe.capacity.drop=random")),
}


def converted(source: Path, name: str, router: str) -> Path:
    """The run folder with null experts, made once."""
    folder = source.parents[1] / "converted" / f"{source.name}-{name}"
    if not (folder / "config.yaml").is_file():
        upcycle(source, folder, [router], UpcycleOptions(), lambda *_: None)
    return folder


def arms(first: PlannedRun) -> dict[str, Arm]:
    """What goes on from a run."""
    rate = f"{RATE}={RATE_AFTER}"
    made = {
        name: replace(arm, settings=(*arm.settings, rate, f"training.start_from={first.dir}"))
        for name, arm in PLAIN.items()
    }
    for name, router in NULL.items():
        folder = converted(first.dir, name, router)
        made[name] = Arm("adamoe", (router, rate, f"training.start_from={folder}"))
    return made


def by_seed(found: dict[int, Comparison], name: str, figure: str) -> dict[int, float]:
    """A figure of a config, from the comparisons of the seeds."""
    return {seed: values(each, name, figure)[seed] for seed, each in found.items()}


def report_on(found: dict[int, Comparison], report: Report) -> None:
    """The table, with each loss against the line at its own rows."""
    loss, rows = (
        {name: by_seed(found, name, figure) for name in next(iter(found.values())).plan.names}
        for figure in ("val_loss", "rows_per_token")
    )
    report.say(
        "| Router | Experts per token and layer | Loss | to top-2 | No worse? | to the line | Below the line? |",
        "|---|--:|--:|--:|---|--:|---|",
    )
    layers = {seed: rows["top1"][seed] for seed in rows["top1"]}
    for name in loss:
        line = {
            seed: loss["top1"][seed] + (loss["top2"][seed] - loss["top1"][seed]) * (rows[name][seed] / layers[seed] - 1)
            for seed in loss[name]
        }
        to_top2, to_line = difference(loss[name], loss["top2"]), difference(loss[name], line)
        tell = better if name in NULL else direction
        experts = {seed: rows[name][seed] / layers[seed] for seed in rows[name]}
        cells = [f"`{name}`", mean(experts, "{:.2f}"), mean(loss[name])]
        cells += ["-", "-"] if name == "top2" else [shown(to_top2), no_worse(to_top2)]
        cells += ["-", "-"] if name in ("top1", "top2") else [shown(to_line), tell(to_line)]
        report.say(f"| {' | '.join(cells)} |")
        report.figures.setdefault("verdicts", {})[name] = {
            "to top2": plain(to_top2, no_worse(to_top2)),
            "to the line": plain(to_line, tell(to_line)),
        }


def main() -> None:
    """Train, convert, go on, and print the table."""
    given = options(__doc__, "runs/null-experts")
    before = Arm("topk", (f"{RATE}={RATE_BEFORE}",))
    first = compared({"before": before}, given, "before")
    found = {}
    for run in first.plan.runs:
        of_seed: Given = replace(given, seeds=(run.seed,))
        found[run.seed] = compared(arms(run), of_seed, f"after-{run.seed}", baseline="top2")
    report = Report(given)
    report_on(found, report)
    report.figures["comparisons"] = comparisons(first, *found.values())
    report.write()


if __name__ == "__main__":
    main()
