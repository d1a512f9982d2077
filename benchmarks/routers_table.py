"""Every router of `configs/routers` at its best of three learning rates, with three seeds.

    python benchmarks/routers_table.py [--output-dir runs/routers] [--seeds 0,1,2] [--set KEY=VALUE ...]

Without the routers that are for benchmarks. The table is that of `moeport compare`, and the control is `random`, which
learns no routing.
"""

from __future__ import annotations

from claims import (
    RATE,
    ROUTERS,
    Arm,
    Report,
    better,
    compared,
    comparisons,
    difference,
    options,
    plain,
    rates,
    shown,
    values,
)

from moeport.studies.compare.table import markdown

RATES = "0.01,0.02,0.04"
OWN = {"cartesian": ("model.moe.expert_hidden=32",)}
"""Settings that keep the number of parameters: CartesianMoE has two sub-layers."""
LEFT_OUT = ("forced_balance", "forced_bias")
ARMS = {
    path.stem: Arm(path.stem, OWN.get(path.stem, ()))
    for path in sorted(ROUTERS.glob("*.yaml"))
    if path.stem not in LEFT_OUT
}


def main() -> None:
    """Train, and print the table."""
    given = options(__doc__, "runs/routers")
    found = compared(ARMS, given, "runs", [f"{RATE}={RATES}"], baseline="topk")
    report = Report(given)
    report.say(markdown(found))
    report.say("| Control | Paired difference of the loss | `topk` better? |", "|---|--:|---|")
    each = difference(values(found, "topk"), values(found, "random"))
    report.say(f"| `topk` against `random` | {shown(each)} | {better(each)} |")
    rates(found, report)
    report.figures["verdicts"] = {"topk against random": plain(each, better(each))}
    report.figures["comparisons"] = comparisons(found)
    report.write()


if __name__ == "__main__":
    main()
