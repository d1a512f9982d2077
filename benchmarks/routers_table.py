"""Every router of `configs/routers` at its best of three learning rates, with three seeds.

    python benchmarks/routers_table.py [--output-dir runs/routers] [--seeds 0,1,2] [--set KEY=VALUE ...]

Without the routers that are for benchmarks. The table is that of `moeport compare`, and the control is `random`, which
learns no routing.
"""

from __future__ import annotations

from claims import (
    ROUTERS,
    Arm,
    Report,
    answer,
    better,
    difference,
    plain,
    shown,
    values,
)

from moeport.studies.compare.outcome import Comparison
from moeport.studies.compare.table import markdown

OWN = {"cartesian": ("model.moe.expert_hidden=32",)}
"""Settings that keep the number of parameters: CartesianMoE has two sub-layers."""
LEFT_OUT = ("forced_balance", "forced_bias")
ARMS = {
    path.stem: Arm(path.stem, OWN.get(path.stem, ()))
    for path in sorted(ROUTERS.glob("*.yaml"))
    if path.stem not in LEFT_OUT
}


def verdicts(found: Comparison, report: Report) -> None:
    """The table, and the control."""
    report.say(markdown(found))
    report.say("| Control | Paired difference of the loss | `topk` better? |", "|---|--:|---|")
    each = difference(values(found, "topk"), values(found, "random"))
    report.say(f"| `topk` against `random` | {shown(each)} | {better(each)} |")
    report.figures["verdicts"] = {"topk against random": plain(each, better(each))}


if __name__ == "__main__":
    answer(__doc__, "runs/routers", ARMS, "topk", verdicts)
