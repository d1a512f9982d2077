"""MaskMoE's claim: rare ids learn better with one expert, against top-2, hash and fine-grained experts.

    python benchmarks/rare_ids.py [--output-dir runs/rare-ids] [--seeds 0,1,2] [--set KEY=VALUE ...]

All configs have a shared expert and equal numbers in their experts, and all but `hash` use equally many of them per
token; each trains at the learning rate that is best for it on the first seed. Losses are also those on rare and on
frequent ids. Control: `inverse`, in which the frequent ids see one expert and the rare ones all. If it is as good as
MaskMoE, frequency has no part in it.
"""

from __future__ import annotations

from claims import (
    RATE,
    Arm,
    Report,
    better,
    compared,
    comparisons,
    difference,
    direction,
    options,
    plain,
    rates,
    shown,
    table,
    values,
)

from moeport.studies.compare.outcome import Comparison

RATES = "0.01,0.02,0.04"
SHARED = ("model.moe.num_shared_experts=1", "model.moe.shared_hidden=64")
ARMS = {
    "top2": Arm("topk", SHARED),
    "fine": Arm(
        "topk",
        (*SHARED, "model.moe.num_experts=16", "model.moe.expert_hidden=32", "model.moe.router.top_k=4"),
    ),
    "hash": Arm("hash", SHARED),
    "hash-wide": Arm("hash", (*SHARED, "model.moe.num_experts=4", "model.moe.expert_hidden=128")),
    "maskmoe": Arm("maskmoe", SHARED),
    "inverse": Arm(
        "maskmoe", (*SHARED, "model.moe.router.visible_infrequent=8", "model.moe.router.visible_frequent=1")
    ),
}
FIGURES = {"all": "val_loss", "rare": "val_loss.rare", "frequent": "val_loss.frequent"}


def verdicts(found: Comparison, report: Report) -> None:
    """The claim for all, rare and frequent ids, and the control."""
    report.say("", "| MaskMoE against | Ids | Paired difference of the loss | Verdict |", "|---|---|--:|---|")
    for other in (name for name in ARMS if name != "maskmoe"):
        for ids, figure in FIGURES.items():
            each = difference(values(found, "maskmoe", figure), values(found, other, figure))
            verdict = (direction if other == "inverse" else better)(each)
            report.say(f"| `{other}` | {ids} | {shown(each)} | {verdict} |")
            report.figures.setdefault("verdicts", {})[f"maskmoe against {other}, {ids} ids"] = plain(each, verdict)


def main() -> None:
    """Train, and print both tables."""
    given = options(__doc__, "runs/rare-ids")
    found = compared(ARMS, given, "runs", [f"{RATE}={RATES}"], baseline="top2")
    report = Report(given)
    table(found, report, FIGURES)
    verdicts(found, report)
    rates(found, report)
    report.figures["comparisons"] = comparisons(found)
    report.write()


if __name__ == "__main__":
    main()
