"""CartesianMoE's claim: two layers of sub-experts are better than plain and fine-grained experts at equal cost.

    python benchmarks/composed_experts.py [--output-dir runs/composed] [--seeds 0,1,2] [--set KEY=VALUE ...]

All configs have shared experts, equal numbers in all experts together and in those that a token uses; each trains at
the learning rate that is best for it on the first seed. Control: the same without a choice, one expert of the active
width in one layer (`one`) and in two sub-layers (`one-and-one`). If two sub-layers gain as much there, the gain is one
of depth and norms, and composition has no part in it.
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
HALF = ("model.moe.num_shared_experts=1", "model.moe.shared_hidden=32")
ARMS = {
    "plain": Arm("topk", SHARED),
    "fine": Arm(
        "topk", (*SHARED, "model.moe.num_experts=16", "model.moe.expert_hidden=32", "model.moe.router.top_k=4")
    ),
    "cartesian": Arm("cartesian", (*HALF, "model.moe.expert_hidden=32")),
    "one": Arm(
        "topk",
        (*SHARED, "model.moe.num_experts=1", "model.moe.expert_hidden=128", "model.moe.router.top_k=1"),
    ),
    "one-and-one": Arm("cartesian", (*HALF, "model.moe.num_experts=1", "model.moe.router.top_k=1")),
}
FIGURES = {"all": "val_loss", "rare": "val_loss.rare", "frequent": "val_loss.frequent"}


def verdicts(found: Comparison, report: Report) -> None:
    """The claim, and what of the difference is due to composition."""
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
    """Train, and print both tables."""
    given = options(__doc__, "runs/composed")
    found = compared(ARMS, given, "runs", [f"{RATE}={RATES}"], baseline="plain")
    report = Report(given)
    table(found, report, FIGURES)
    verdicts(found, report)
    rates(found, report)
    report.figures["comparisons"] = comparisons(found)
    report.write()


if __name__ == "__main__":
    main()
