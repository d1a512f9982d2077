"""MaskMoE's claim: rare ids learn better with one expert, against top-2, hash and fine-grained experts.

    python benchmarks/rare_ids.py [--output-dir runs/rare-ids] [--seeds 0,1,2] [--set KEY=VALUE ...]

All configs have a shared expert and equally many parameters in their experts. `hash` uses fewer of them per token, and
so do `maskmoe` and `inverse` for the ids that see one expert; the others use equally many. Each trains at the learning
rate that is best for it on the first seed. Losses are also those on rare and on frequent ids. Control: `inverse`, in
which the frequent ids see one expert and the rare ones all. If it is as good as MaskMoE, frequency has no part in it.
"""

from __future__ import annotations

from claims import (
    LOSSES,
    SHARED_EXPERT,
    Arm,
    Report,
    answer,
    better,
    difference,
    direction,
    plain,
    shown,
    table,
    values,
)

from moeport.studies.compare.outcome import Comparison

ARMS = {
    "top2": Arm("topk", SHARED_EXPERT),
    "fine": Arm(
        "topk",
        (*SHARED_EXPERT, "model.moe.num_experts=16", "model.moe.expert_hidden=32", "model.moe.router.top_k=4"),
    ),
    "hash": Arm("hash", SHARED_EXPERT),
    "hash-wide": Arm("hash", (*SHARED_EXPERT, "model.moe.num_experts=4", "model.moe.expert_hidden=128")),
    "maskmoe": Arm("maskmoe", SHARED_EXPERT),
    "inverse": Arm(
        "maskmoe", (*SHARED_EXPERT, "model.moe.router.visible_infrequent=8", "model.moe.router.visible_frequent=1")
    ),
}


def verdicts(found: Comparison, report: Report) -> None:
    """The claim for all, rare and frequent ids, and the control."""
    table(found, report, LOSSES)
    report.say("", "| MaskMoE against | Ids | Paired difference of the loss | Verdict |", "|---|---|--:|---|")
    for other in (name for name in ARMS if name != "maskmoe"):
        for ids, figure in LOSSES.items():
            each = difference(values(found, "maskmoe", figure), values(found, other, figure))
            verdict = (direction if other == "inverse" else better)(each)
            report.say(f"| `{other}` | {ids} | {shown(each)} | {verdict} |")
            report.figures.setdefault("verdicts", {})[f"maskmoe against {other}, {ids} ids"] = plain(each, verdict)


def main() -> None:
    """Train, and print the tables."""
    answer(__doc__, "runs/rare-ids", ARMS, "top2", verdicts)


if __name__ == "__main__":
    main()
