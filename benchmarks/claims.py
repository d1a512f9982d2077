"""What the scripts of the papers' claims share: small configs side by side, paired differences, and verdicts.

A claim is a question about a difference between two configs. Its verdict is computed from the interval of the paired
differences and from a margin in nats that is fixed beforehand, never from the sign of a mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeport.config import load_config, resolved_yaml
from moeport.files import write_text
from moeport.pages.console import PlainConsole
from moeport.studies.compare.compare import compare
from moeport.studies.compare.export import to_json
from moeport.studies.compare.outcome import Comparison
from moeport.studies.compare.page import write_page
from moeport.studies.compare.plan import plan
from moeport.studies.compare.spread import Paired, paired, spread

ROUTERS = Path(__file__).parents[1] / "configs" / "routers"
RATE = "optimizer.learning_rate"
ALLOWED = (RATE, "training.start_from")
"""Keys that may differ besides `model.moe`."""
MARGIN = 0.02
"""Nats within which two losses count as equal: about half a percent of the losses here. Ours."""
SMALL = (
    "model.d_model=64",
    "model.num_layers=2",
    "model.moe.num_experts=8",
    "model.moe.expert_hidden=64",
    "data.sequence_length=128",
    "data.tokenizer.vocab_size=1024",
    "training.steps=200",
    "training.batch_size=16",
    "training.evaluation_interval=0",
    "optimizer.schedule.warmup_steps=20",
    "checkpoint.interval=0",
    "metrics.report=false",
    "metrics.log_interval=50",
    "metrics.peak_tflops=1",
)
"""The size at which a claim fits half an hour of one core; the rest is that of `configs/routers`."""
RATES = "0.005,0.01,0.02,0.04"
"""Learning rates that are tried for each config."""
SHARED_EXPERT = ("model.moe.num_shared_experts=1", "model.moe.shared_hidden=64")
LOSSES = {"all": "val_loss", "rare": "val_loss.rare", "frequent": "val_loss.frequent"}
"""Figures by the ids that they are about."""
COSTS = ("parameters_total", "parameters_active", "expert_flops_per_token")
Values = Mapping[int, float]
"""A figure by seed."""


@dataclass(frozen=True)
class Arm:
    """One config of a claim."""

    router: str
    """A file of `configs/routers`, without its suffix."""
    settings: tuple[str, ...] = ()
    """KEY=VALUE, laid over it and over its size."""
    size: tuple[str, ...] = SMALL
    """KEY=VALUE, laid over the file."""


@dataclass(frozen=True)
class Given:
    """What the command line says."""

    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: tuple[str, ...] = ()
    json_file: Path | None = None
    own: Mapping[str, str] = field(default_factory=dict)
    """The script's own options, by name."""


@dataclass
class Report:
    """What a script prints and writes."""

    given: Given
    name: str = "claim"
    """Of its files."""
    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def say(self, *lines: str) -> None:
        """Add lines of Markdown."""
        self.lines += lines
        print("\n".join(lines), flush=True)

    def write(self) -> None:
        """Write the lines as Markdown among the runs, and all figures as JSON beside it or to `--json`."""
        write_text(self.given.folder / f"{self.name}.md", "\n".join(self.lines) + "\n")
        file = self.given.json_file or self.given.folder / f"{self.name}.json"
        write_text(file, json.dumps(self.figures, indent=1) + "\n")


def options(description: str | None, folder: str, **own: str) -> Given:
    """Read the command line of a script; `own` are its own options with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(folder), help="of the runs; repeat to continue")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every config")
    parser.add_argument("--json", type=Path, help="file for all figures; default: beside the tables, among the runs")
    for name, default in own.items():
        parser.add_argument(f"--{name}", default=default)
    found = parser.parse_args()
    chosen = {name: getattr(found, name) for name in own}
    return Given(found.output_dir, tuple(map(int, found.seeds.split(","))), tuple(found.set), found.json, chosen)


def compared(
    arms: Mapping[str, Arm],
    given: Given,
    part: str,
    sweeps: Sequence[str] = (),
    baseline: str | None = None,
    allowed: Sequence[str] = (),
) -> Comparison:
    """Train what is not trained yet, in a folder of its own; `allowed` are further keys that may differ.

    Raises SystemExit if a run failed, with the reasons; repeating the command tries it again.
    """
    folder = given.folder / part
    files = []
    for name, arm in arms.items():
        settings = (*arm.size, *arm.settings, *given.settings)
        files.append(folder / "configs" / f"{name}.yaml")
        write_text(files[-1], resolved_yaml(load_config(ROUTERS / f"{arm.router}.yaml", settings)))
    runs = plan(files, folder, seeds=given.seeds, sweeps=sweeps, baseline=baseline, allowed=(*ALLOWED, *allowed))
    found = compare(runs, console=PlainConsole())
    write_page(found, folder)
    if problems := [f"{each.run.dir}: {each.problem}" for each in found.outcomes if each.problem and not each.diverged]:
        raise SystemExit("\n".join([found.interruption, *problems]))
    return found


def values(comparison: Comparison, name: str, figure: str = "val_loss") -> Values:
    """A figure of a config by seed. Raises ValueError where a run has not recorded it."""
    found = {seed: one.values().get(figure) for seed, one in comparison.figures(name).items()}
    if missing := [seed for seed, value in found.items() if value is None]:
        raise ValueError(f"{name}: the run of seed {missing[0]} has no figure {figure!r}")
    return {seed: float(value) for seed, value in found.items() if value is not None}


def difference(own: Values, other: Values) -> Paired:
    """The paired difference of the seeds that both have."""
    return paired([own[seed] - other[seed] for seed in own if seed in other])


def interpolated(curve: Sequence[tuple[Values, Values]], wanted: Values) -> Values:
    """What a curve gives at some place, for each seed linear between its two nearest points.

    Args:
        curve: two figures of each config, such as rows and losses.
        wanted: values of the first figure, at which the second is read.

    Raises ValueError beyond the curve's ends.
    """
    found = {}
    for seed, place in wanted.items():
        points = sorted((x[seed], y[seed]) for x, y in curve)
        if not points[0][0] <= place <= points[-1][0]:
            raise ValueError(f"{place:.4g} is beyond {points[0][0]:.4g} to {points[-1][0]:.4g}")
        found[seed] = float(np.interp(place, [x for x, _ in points], [y for _, y in points]))
    return found


def direction(found: Paired) -> str:
    """Whether a loss is lower or higher than another, as far as the interval tells."""
    if found.verdict in ("lower", "higher"):
        return found.verdict
    if found.low is not None and found.high is not None and max(-found.low, found.high) <= MARGIN:
        return f"equal within {MARGIN}"
    return found.verdict


def no_worse(found: Paired) -> str:
    """The verdict on the claim that a loss is not higher than another."""
    if found.low is None or found.high is None:
        return "one seed, no verdict"
    if found.high <= MARGIN:
        return "shown"
    return "refuted" if found.low > 0 else "not resolved"


def better(found: Paired) -> str:
    """The verdict on the claim that a loss is lower than another."""
    return {"lower": "shown", "higher": "refuted", "not resolved": "not shown", "one seed": "one seed, no verdict"}[
        found.verdict
    ]


def mean(found: Values, form: str = "{:.4f}") -> str:
    """Mean ± standard deviation over the seeds."""
    each = spread(list(found.values()))
    return form.format(each.mean) + ("" if each.deviation is None else f" ± {form.format(each.deviation)}")


def shown(found: Paired) -> str:
    """A paired difference with its interval."""
    if found.low is None or found.high is None:
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def percent(found: Paired) -> str:
    """A relative difference with its interval."""
    if found.low is None or found.high is None:
        return f"{found.mean:+.1%}"
    return f"{found.mean:+.1%} [{found.low:+.1%}, {found.high:+.1%}]"


def plain(found: Paired, verdict: str) -> dict[str, Any]:
    """A difference and its verdict, for the JSON."""
    return {**asdict(found), "verdict": verdict}


def comparisons(*found: Comparison) -> list[dict[str, Any]]:
    """All figures of comparisons, for the JSON."""
    return [to_json(each) for each in found]


def table(found: Comparison, report: Report, losses: Mapping[str, str]) -> None:
    """Parameters, costs and losses of each config.

    Args:
        found: the comparison.
        report: where the table goes.
        losses: the figures by title.
    """
    titles = ["Parameters", "active", "Expert FLOPs per token", *(f"Loss, {title}" for title in losses)]
    report.say(f"| Config | {' | '.join(titles)} |", f"|---|{'--:|' * len(titles)}")
    for name in found.plan.names:
        costs = (values(found, name, figure) for figure in COSTS)
        cells = [f"{sum(each.values()) / len(each):,.0f}" for each in costs]
        cells += [mean(values(found, name, figure)) for figure in losses.values()]
        report.say(f"| `{name}` | {' | '.join(cells)} |")


def rates(found: Comparison, report: Report) -> None:
    """What the sweep tried, and which value each config has."""
    report.say("")
    for name, chosen in found.choices.items():
        tried = ", ".join(f"{each.value}: {each.loss:.4f}" for each in found.tried(name))
        report.say(f"- `{name}`: learning rate {chosen} of {tried}")


def answer(
    description: str | None,
    folder: str,
    arms: Mapping[str, Arm],
    baseline: str,
    verdicts: Callable[[Comparison, Report], None],
) -> None:
    """The whole of a script: train each config at its best rate, let `verdicts` say what follows, and write it."""
    given = options(description, folder)
    found = compared(arms, given, "runs", [f"{RATE}={RATES}"], baseline=baseline)
    report = Report(given)
    verdicts(found, report)
    rates(found, report)
    report.figures["comparisons"] = comparisons(found)
    report.write()
