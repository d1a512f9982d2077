"""All figures of a comparison as JSON and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeport.files import atomic_file
from moeport.studies.compare.figures import ALL_TO_ALL
from moeport.studies.compare.outcome import Comparison
from moeport.studies.compare.spread import METHOD, spread
from moeport.studies.compare.table import explanations


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as plain values."""
    plan = comparison.plan
    return {
        "baseline": plan.baseline,
        "seeds": plan.seeds,
        "ranks": comparison.ranks,
        "all_to_all_bytes": ALL_TO_ALL,
        "interval": METHOD,
        "explanations": explanations(comparison),
        "configs": [_config_json(comparison, name) for name in plan.names],
    }


def _config_json(comparison: Comparison, name: str) -> dict[str, Any]:
    plan, by_seed = comparison.plan, comparison.figures(name)
    runs = [figures.values() for figures in by_seed.values()]
    known = {figure: [x for run in runs if (x := run.get(figure)) is not None] for figure in (runs[0] if runs else ())}
    spreads = {figure: spread(values) for figure, values in known.items() if values}
    return {
        "name": name,
        "differences": {d.key: {"baseline": d.before, "value": d.now} for d in plan.differences(name)},
        "sweep": _sweep_json(comparison, name),
        "mean": {figure: value.mean for figure, value in spreads.items()},
        "deviation": {figure: value.deviation for figure, value in spreads.items()},
        "to_baseline": {} if name == plan.baseline else _to_baseline(comparison, name, list(spreads)),
        "runs": [
            {
                "seed": outcome.run.seed,
                "run_dir": str(outcome.run.dir),
                "problem": outcome.problem or None,
                "figures": outcome.result.figures.values() if outcome.result else None,
            }
            for outcome in comparison.of(name)
        ],
    }


def _sweep_json(comparison: Comparison, name: str) -> dict[str, Any] | None:
    sweep = comparison.plan.sweeps.get(name)
    if sweep is None:
        return None
    values = [
        {
            "value": each.value,
            "val_losses": list(each.losses),
            "diverged": each.diverged,
            "problems": list(each.problems),
        }
        for each in comparison.tried(name)
    ]
    chosen_on = comparison.plan.chosen_on
    return {"key": sweep.key, "chosen": comparison.choices.get(name), "chosen_on": chosen_on, "values": values}


def _to_baseline(comparison: Comparison, name: str, figures: Sequence[str]) -> dict[str, Any]:
    """The paired difference and the ratio of each figure, with interval and verdict."""
    found = {}
    for figure in figures:
        kinds = {"difference": comparison.difference(name, figure), "ratio": comparison.difference(name, figure, True)}
        found[figure] = {
            kind: None if each is None else asdict(each) | {"verdict": each.verdict} for kind, each in kinds.items()
        }
    return found


def write_csv(path: Path, comparison: Comparison) -> None:
    """Write all figures of all finished runs, one line per run, also those of values that a sweep did not choose.

    Raises WriteError.
    """
    plan, lines = comparison.plan, []
    for outcome in comparison.outcomes:
        run, sweep = outcome.run, plan.sweeps.get(outcome.run.name)
        chosen = sweep is None or comparison.choices.get(run.name) == run.value
        lines.append(
            {
                "name": run.name,
                "seed": run.seed,
                "swept_key": sweep.key if sweep else "",
                "swept_value": run.value,
                "chosen": int(chosen),
                "run_dir": str(run.dir),
                "problem": outcome.problem,
                **(outcome.result.figures.values() if outcome.result else {}),
            }
        )
    header = list(dict.fromkeys(name for line in lines for name in line))
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(lines)
