"""LocMoE+'s claim of fewer rows at equal quality: loss against rows of `topk` and `locmoe_plus`, with controls.

    python benchmarks/rows_at_equal_loss.py [--output-dir runs/rows] [--seeds 0,1,2] [--factors 1.25,0.75,...]

Both routers train at six capacities, each at the learning rate that is best for it at a capacity factor of 1.25 on the
first seed. `locmoe_plus` also has the capacity that it estimates, limited only by 8 times the even share. Controls:
one row per expert, which leaves little but attention; rows dropped at random in training instead of by position, gate
or affinity. If the first is as good as 1.25, rows do not matter here and nothing follows from the rest; if random
drops are as good as LocMoE+'s, affinity has no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from claims import (
    RATE,
    RATES,
    Arm,
    Given,
    Report,
    better,
    compared,
    comparisons,
    difference,
    direction,
    interpolated,
    mean,
    no_worse,
    options,
    percent,
    plain,
    shown,
    values,
)

from moeport.studies.compare.outcome import Comparison
from moeport.studies.compare.spread import paired

FACTORS = "1.25,0.75,0.5,0.3125,0.2,0.1"
CONTROLLED = (0.5, 0.2)
"""Factors at which rows are dropped at random."""
ROUTERS = {"topk": "topk_capacity", "locmoe_plus": "locmoe_plus"}
DROPS = {"topk": ("position", "random"), "locmoe_plus": ("affinity", "random")}
"""The first is the default of the router's config."""
SHARE = 0.6
"""Rows of the claim, as a share of those of top-k at 1.25: 40% fewer."""
ONE_ROW = 1e-6
"""A capacity factor with which each expert takes a single row of a batch."""
WITHOUT_FACTOR = {"one-row": "one row per expert", "estimated": "estimated"}


def arms(rates: Mapping[str, str], factors: Sequence[float]) -> dict[str, Arm]:
    """All configs, each at the learning rate of its router; what decides most comes first."""
    made = {"topk-one-row": _arm("topk", rates["topk"], DROPS["topk"][0], ONE_ROW)}
    for factor in factors:
        for router, (own, *_) in DROPS.items():
            made[_name(router, own, factor)] = _arm(router, rates[router], own, factor)
    for factor in filter(factors.__contains__, CONTROLLED):
        for router in DROPS:
            made[_name(router, "random", factor)] = _arm(router, rates[router], "random", factor)
    estimate = (
        "model.moe.capacity.policy=locmoe_plus",
        "model.moe.capacity.factor=8",
        f"{RATE}={rates['locmoe_plus']}",
    )
    return {**made, "locmoe_plus-estimated": Arm("locmoe_plus", estimate)}


def _name(router: str, drop: str, factor: float) -> str:
    return f"{router}-{drop}-{factor:g}"


def _arm(router: str, rate: str, drop: str, factor: float) -> Arm:
    capacity = (f"model.moe.capacity.factor={factor}", f"model.moe.capacity.drop={drop}")
    return Arm(ROUTERS[router], (*capacity, f"{RATE}={rate}"))


def at_capacity(router: str, factor: float) -> str:
    """Name of a router's config at a capacity, dropping as is usual for it."""
    return _name(router, DROPS[router][0], factor)


def factors_of(given: Given) -> tuple[float, ...]:
    """The capacity factors of the command line."""
    return tuple(map(float, given.own["factors"].split(",")))


def trained(given: Given) -> tuple[Comparison, Comparison]:
    """The sweep of the rates, and all configs at the best one of their router."""
    given = replace(given, settings=("metrics.loss_by_frequency=false", *given.settings))
    first = replace(given, seeds=given.seeds[:1])
    swept = compared({router: Arm(file) for router, file in ROUTERS.items()}, first, "rates", [f"{RATE}={RATES}"])
    factors = factors_of(given)
    wanted = arms(swept.choices, factors)
    return swept, compared(wanted, given, "capacities", baseline=_name("topk", "position", factors[0]))


def losses(found: Comparison, report: Report) -> None:
    """Loss and rows of every config."""
    report.say(
        "| Router | Dropped by | Capacity factor | Rows per token | Dropped | Loss | to `topk` at 1.25 |",
        "|---|---|--:|--:|--:|--:|--:|",
    )
    base = values(found, found.plan.baseline)
    for name in found.plan.names:
        router, _, rest = name.partition("-")
        drop, _, factor = rest.partition("-")
        if rest in WITHOUT_FACTOR:
            drop, factor = DROPS[router][0], WITHOUT_FACTOR[rest]
        own = values(found, name)
        rows, dropped = (values(found, name, figure) for figure in ("rows_per_token", "drop_rate"))
        to_base = "-" if name == found.plan.baseline else shown(difference(own, base))
        report.say(
            f"| `{router}` | {drop} | {factor} | {mean(rows, '{:.3f}')} | {mean(dropped, '{:.1%}')} | {mean(own)} | "
            f"{to_base} |"
        )


def verdicts(found: Comparison, report: Report) -> None:
    """What follows from them."""
    factors = factors_of(report.given)
    report.say("", "| Question | Paired difference of the loss | Verdict |", "|---|--:|---|")
    base = found.plan.baseline
    full_rows, full = values(found, base, "rows_total"), values(found, base)
    wanted = {seed: SHARE * rows for seed, rows in full_rows.items()}

    def curve(router: str, drop: str) -> dict[int, float]:
        names = [_name(router, drop, factor) for factor in factors]
        return dict(interpolated([(values(found, name, "rows_total"), values(found, name)) for name in names], wanted))

    ours, plain_topk = curve("locmoe_plus", "affinity"), curve("topk", "position")
    asked = {
        "Do rows matter? `topk` at 1.25 against one row per expert": (
            difference(full, values(found, "topk-one-row")),
            better,
        ),
        "The claim: `locmoe_plus` with 60% of the rows, no worse than `topk` at 1.25": (
            difference(ours, full),
            no_worse,
        ),
        "Without LocMoE+: `topk` with 60% of the rows, no worse than at 1.25": (difference(plain_topk, full), no_worse),
        "At equal rows, 60%: `locmoe_plus` against `topk`": (difference(ours, plain_topk), direction),
    }
    for router, (own, *_) in DROPS.items():
        for factor in filter(factors.__contains__, CONTROLLED):
            pair = (values(found, _name(router, drop, factor)) for drop in (own, "random"))
            asked[f"`{router}` at {factor:g}: dropped by {own} against at random"] = (difference(*pair), direction)
    for factor in factors:
        one, other = (_name("locmoe_plus", "affinity", factor), _name("topk", "position", factor))
        rows = [sum(values(found, name, "rows_total").values()) for name in (one, other)]
        text = f"At a factor of {factor:g}, with {rows[0] / rows[1]:.3f} of the rows: `locmoe_plus` against `topk`"
        asked[text] = (difference(values(found, one), values(found, other)), direction)
    for question, (each, tell) in asked.items():
        report.say(f"| {question} | {shown(each)} | {tell(each)} |")
        report.figures.setdefault("verdicts", {})[question] = plain(each, tell(each))


def saved(found: Comparison, report: Report) -> None:
    """How many rows `topk` needs for the loss that `locmoe_plus` has at each capacity."""
    report.say(
        "",
        "| Capacity factor of `locmoe_plus` | Its loss | Its rows per token | `topk` needs | Difference | Fewer? |",
        "|--:|--:|--:|--:|--:|---|",
    )
    names = ["topk-one-row", *(at_capacity("topk", factor) for factor in factors_of(report.given))]
    curve = [(values(found, name), values(found, name, "rows_per_token")) for name in names]
    for factor in factors_of(report.given):
        own = at_capacity("locmoe_plus", factor)
        loss, rows = values(found, own), values(found, own, "rows_per_token")
        cells = [f"{factor:g}", mean(loss), mean(rows, "{:.3f}")]
        try:
            needed = interpolated(curve, loss)
        except ValueError:
            cells += ["not among its losses", "", ""]
        else:
            each = paired([rows[seed] / needed[seed] - 1 for seed in rows])
            cells += [mean(needed, "{:.3f}"), percent(each), better(each)]
            report.figures.setdefault("rows at the same loss", {})[own] = plain(each, better(each))
        report.say(f"| {' | '.join(cells)} |")


def main() -> None:
    """Train, and print the tables."""
    given = options(__doc__, "runs/rows", factors=FACTORS)
    swept, found = trained(given)
    report = Report(given)
    report.say("Learning rates: " + ", ".join(f"`{name}` {rate}" for name, rate in swept.choices.items()) + ".", "")
    losses(found, report)
    verdicts(found, report)
    saved(found, report)
    report.figures["comparisons"] = comparisons(swept, found)
    report.write()


if __name__ == "__main__":
    main()
