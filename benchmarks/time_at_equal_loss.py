"""LocMoE+'s claim of less time at equal quality: steps of `topk` and `locmoe_plus` on an emulated cluster.

    python benchmarks/time_at_equal_loss.py [--output-dir runs/rows] [--link 300mbit] [--rounds 3]

Takes the runs of `rows_at_equal_loss.py`, or makes them, and lets the trained models of the first seed take steps on
two nodes of one rank each, at three capacities. The configs take turns, in an order that each round rotates. For each
capacity of `locmoe_plus`: the time of `topk` at the same loss, linear between the two nearest of its capacities.
Control: at equal capacities both compute equally many rows, so a difference there is not one of rows.

Needs root, as `moeport emulate` does.
"""

from __future__ import annotations

import json
import statistics

import numpy as np
from claims import Given, Report, mean, options, values
from emulated import Cluster, timed
from rows_at_equal_loss import FACTORS, at_capacity, trained

from moeport.studies.compare.outcome import Comparison

TIMED = (1.25, 0.75, 0.5)
"""Capacity factors, in falling order."""
Times = dict[str, list[dict[str, float]]]
"""By config, what each round gave."""


def times(given: Given, found: Comparison) -> Times:
    """Time each config in turns; finished jobs are read."""
    cluster = Cluster(1, "flat", given.own["link"])
    folder = given.folder / "times" / cluster.rate
    folder.mkdir(parents=True, exist_ok=True)
    names = [at_capacity(router, factor) for factor in TIMED for router in ("topk", "locmoe_plus")]
    taken: Times = {name: [] for name in names}
    for number in range(int(given.own["rounds"])):
        shift = 2 * number % len(names)
        for name in names[shift:] + names[:shift]:
            output = folder / f"{name}-{number}.json"
            run = found.plan.of(name)[0].dir
            if not output.exists():
                timed(name, run / "config.yaml", run, cluster, output)
            taken[name].append(json.loads(output.read_text()))
            print(f"round {number + 1}: {name} {taken[name][-1]['step']:.3f} s", flush=True)
    return taken


def compared(found: Comparison, taken: Times, report: Report) -> None:
    """The times, and what they are against `topk` at the same loss and at the same capacity."""
    loss = {name: statistics.fmean(values(found, name).values()) for name in taken}
    curve = sorted((loss[at_capacity("topk", factor)], factor) for factor in TIMED)
    report.say(
        "| Config | Loss | Rows per token | Step, s | All-to-all | to `topk` at the same loss | at the same capacity |",
        "|---|--:|--:|--:|--:|---|---|",
    )
    for name, rounds in taken.items():
        cells = [mean(values(found, name)), mean(values(found, name, "rows_per_token"), "{:.2f}")]
        cells.append(f"{statistics.median(each['step'] for each in rounds):.3f}")
        cells.append(f"{statistics.median(each['exchange'] / each['step'] for each in rounds):.0%}")
        if name.startswith("locmoe_plus"):
            same = name.replace("locmoe_plus-affinity", "topk-position")
            at_loss, at_rows = [], []
            for number, each in enumerate(rounds):
                seconds = [taken[at_capacity("topk", factor)][number]["step"] for _, factor in curve]
                equal = float(np.interp(loss[name], [point for point, _ in curve], seconds))
                at_loss.append(each["step"] / equal - 1)
                at_rows.append(each["step"] / taken[same][number]["step"] - 1)
            is_inside = curve[0][0] <= loss[name] <= curve[-1][0]
            cells += [_shown(at_loss) if is_inside else "beyond the losses of `topk`", _shown(at_rows)]
            report.figures[name] = {"at_the_same_loss": at_loss, "at_the_same_capacity": at_rows}
        else:
            cells += ["", ""]
        report.say(f"| `{name}` | " + " | ".join(cells) + " |")
    report.figures["times"] = taken


def _shown(relative: list[float]) -> str:
    return f"{statistics.median(relative):+.1%} ({', '.join(f'{value:+.1%}' for value in relative)})"


def main() -> None:
    """Train what is not trained, time, and print the table."""
    given = options(__doc__, "runs/rows", factors=FACTORS, link="300mbit", rounds="3")
    _, found = trained(given)
    report = Report(given, "time_at_equal_loss")
    compared(found, times(given, found), report)
    report.write()


if __name__ == "__main__":
    main()
