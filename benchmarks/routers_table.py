"""Every router of `configs/routers` at its best of four learning rates, with three seeds.

    python benchmarks/routers_table.py [--output-dir runs/routers] [--seeds 0,1,2] [--set KEY=VALUE ...]

Without the routers that are for benchmarks. The table is that of `moeport compare`; below it is what the papers say of
the loss, with verdicts. The control is `random`, which learns no routing.
"""

from __future__ import annotations

from collections.abc import Callable

from claims import (
    ROUTERS,
    Arm,
    Report,
    answer,
    better,
    difference,
    no_worse,
    plain,
    shown,
    values,
)

from moeport.studies.compare.outcome import Comparison
from moeport.studies.compare.spread import Paired
from moeport.studies.compare.table import markdown

OWN = {"cartesian": ("model.moe.expert_hidden=32",)}
"""Settings that keep the number of parameters: CartesianMoE has two sub-layers."""
LEFT_OUT = ("forced_balance", "forced_bias")
ARMS = {
    path.stem: Arm(path.stem, OWN.get(path.stem, ()))
    for path in sorted(ROUTERS.glob("*.yaml"))
    if path.stem not in LEFT_OUT
}


Asked = Callable[[Paired], str]
CLAIMS: tuple[tuple[str, str, str, Asked], ...] = (
    ("Control: `topk` is better than experts drawn at random", "topk", "random", better),
    ("Hash layers: no worse than learned routing", "hash", "topk", no_worse),
    ("Hash layers, at equal rows: no worse than learned routing", "hash", "switch", no_worse),
    ("MaskMoE: better than top-2", "maskmoe", "topk", better),
    ("X-MoE: better than top-2", "xmoe", "topk", better),
    ("CartesianMoE: better than top-2", "cartesian", "topk", better),
    ("AdaMoE: no worse than top-2", "adamoe", "topk", no_worse),
    ("Top-p: no worse than top-2", "top_p", "topk", no_worse),
    ("GShard: dropping second choices at random is no worse than top-2", "gshard", "topk", no_worse),
    ("A capacity factor of 1.25 is no worse than none", "topk_capacity", "topk", no_worse),
    ("LocMoE+: no worse than top-2 with the same capacity factor", "locmoe_plus", "topk_capacity", no_worse),
    ("Loss-free balancing (`sigmoid_bias`): no worse than top-2", "sigmoid_bias", "topk", no_worse),
    ("Sinkhorn: no worse than top-2", "sinkhorn_token_choice", "topk", no_worse),
    ("LocMoE: better than Switch", "locmoe", "switch", better),
    ("LocMoE as printed: better than Switch", "locmoe_printed", "switch", better),
    ("BASE: better than Switch", "base", "switch", better),
    ("RRE: experts drawn by id are no worse than Switch", "rre", "switch", no_worse),
    ("THOR: experts drawn at random are no worse than Switch", "random", "switch", no_worse),
)
"""What the papers say of the loss: two configs, and what is asked of the first."""


def verdicts(found: Comparison, report: Report) -> None:
    """The table, and what follows for each claim."""
    report.say(markdown(found))
    report.say("| Claim | Configs | Paired difference of the loss | Verdict |", "|---|---|--:|---|")
    told = report.figures.setdefault("verdicts", {})
    for claim, own, other, tell in CLAIMS:
        each = difference(values(found, own), values(found, other))
        report.say(f"| {claim} | `{own}`, `{other}` | {shown(each)} | {tell(each)} |")
        told[claim] = plain(each, tell(each))


def main() -> None:
    """Train, and print the tables."""
    answer(__doc__, "runs/routers", ARMS, "topk", verdicts)


if __name__ == "__main__":
    main()
