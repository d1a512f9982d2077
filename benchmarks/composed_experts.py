"""CartesianMoE's claim: two layers of sub-experts are better than plain and fine-grained experts at equal cost.

    python benchmarks/composed_experts.py [--output-dir runs/composed] [--seeds 0,1,2] [--set KEY=VALUE ...]

All configs have equally many parameters in the experts that a token uses, and all but the controls in all experts
together; each trains at the learning rate that is best for it on the first seed. Control: the same without a choice,
one expert of the active width in one layer (`one`) and in two sub-layers (`one-and-one`). If two sub-layers gain as
much there, the gain is one of depth and norms, and composition has no part in it.
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
    plain,
    shown,
    table,
    values,
)

from moeport.studies.compare.outcome import Comparison

HALF = ("model.moe.num_shared_experts=1", "model.moe.shared_hidden=32")
ARMS = {
    "plain": Arm("topk", SHARED_EXPERT),
    "fine": Arm(
        "topk", (*SHARED_EXPERT, "model.moe.num_experts=16", "model.moe.expert_hidden=32", "model.moe.router.top_k=4")
    ),
    "cartesian": Arm("cartesian", (*HALF, "model.moe.expert_hidden=32")),
    "one": Arm(
        "topk",
        (*SHARED_EXPERT, "model.moe.num_experts=1", "model.moe.expert_hidden=128", "model.moe.router.top_k=1"),
    ),
    "one-and-one": Arm("cartesian", (*HALF, "model.moe.num_experts=1", "model.moe.router.top_k=1")),
}


def verdicts(found: Comparison, report: Report) -> None:
    """The claim, and how much of the difference comes from composition."""
    table(found, report, LOSSES)
    loss = {name: values(found, name) for name in ARMS}
    gain = {seed: loss["cartesian"][seed] - loss["plain"][seed] for seed in loss["plain"]}
    depth = {seed: loss["one-and-one"][seed] - loss["one"][seed] for seed in loss["one"]}
    asked = {
        "`cartesian` against `plain`": difference(loss["cartesian"], loss["plain"]),
        "`cartesian` against `fine`": difference(loss["cartesian"], loss["fine"]),
        "without a choice: `one-and-one` against `one`": difference(loss["one-and-one"], loss["one"]),
        "`cartesian` against `plain`, less what two sub-layers gain without a choice": difference(gain, depth),
    }
    report.say("", "| Question: better? | Paired difference of the loss | Verdict |", "|---|--:|---|")
    for question, each in asked.items():
        report.say(f"| {question} | {shown(each)} | {better(each)} |")
        report.figures.setdefault("verdicts", {})[question] = plain(each, better(each))


def main() -> None:
    """Train, and print the tables."""
    answer(__doc__, "runs/composed", ARMS, "plain", verdicts)


if __name__ == "__main__":
    main()
