"""What came of the runs of a comparison, and which value of a sweep each config keeps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeport.errors import InterruptedRunError, RunError
from moeport.files import remove, write_json
from moeport.reading import read_bytes
from moeport.studies.compare.figures import Figures, RunResult
from moeport.studies.compare.plan import Plan, PlannedRun
from moeport.studies.compare.spread import Paired, paired

NOT_TRAINED = "not trained yet"
DIVERGED_FILE = "diverged.json"
"""In the folder of a run of a sweep: that it diverged, so that it is not tried again."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run."""

    run: PlannedRun
    result: RunResult | None
    problem: str
    """The reason if there is no result; otherwise empty."""
    diverged: bool = False
    """Whether the reason is a NaN or infinity: in a sweep, a value that is too high."""


@dataclass(frozen=True)
class Tried:
    """One value of a sweep."""

    value: str
    losses: tuple[float, ...]
    """Validation losses of the seeds that decide, as far as they are known."""
    problems: tuple[str, ...]
    """The reasons why others are not."""
    diverged: bool
    """Whether a run diverged, so that the value is out."""

    @property
    def loss(self) -> float:
        """Their mean; infinite for a value that is out, NaN as long as it is not known."""
        if self.diverged:
            return math.inf
        return statistics.fmean(self.losses) if self.losses and not self.problems else math.nan


@dataclass(frozen=True)
class Comparison:
    """All runs and their outcomes."""

    plan: Plan
    known: Mapping[Path, Outcome]
    """The outcomes by run folder; runs that were not needed, or not yet, are left out."""
    ranks: int
    """N of the all-to-all."""
    data: str
    """Describes the training data."""
    interruption: str
    """Where it was stopped; empty if it was not."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """The best value of each config that sweeps a key, where it is known."""

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The outcomes of all runs that are needed, in order; those that are not trained yet say so."""
        return tuple(map(self._outcome, self.plan.needed(self.choices)))

    def of(self, name: str) -> list[Outcome]:
        """The outcomes of a config with its best value, one per seed."""
        if name in self.plan.sweeps and name not in self.choices:
            return [self._outcome(run) for run in self.plan.deciding(name)]
        return [self._outcome(run) for run in self.plan.of(name, self.choices.get(name))]

    def _outcome(self, run: PlannedRun) -> Outcome:
        return self.known.get(run.dir) or Outcome(run, None, NOT_TRAINED)

    def figures(self, name: str) -> dict[int, Figures]:
        """Figures of a config's finished runs with its best value, by seed; none as long as no value is chosen."""
        if name in self.plan.sweeps and name not in self.choices:
            return {}
        return {outcome.run.seed: outcome.result.figures for outcome in self.of(name) if outcome.result}

    def tried(self, name: str) -> list[Tried]:
        """All values of a config's sweep, as far as they are known."""
        return tried(self.plan, self.known, name)

    def difference(self, name: str, figure: str, ratio: bool = False) -> Paired | None:
        """The paired difference of a figure to the baseline, or their ratio; None without a seed that both have."""
        own, base = self.figures(name), self.figures(self.plan.baseline)
        pairs = [(own[seed].values().get(figure), base[seed].values().get(figure)) for seed in own if seed in base]
        known = [(a, b) for a, b in pairs if a is not None and b is not None and (b or not ratio)]
        if not known:
            return None
        return paired([a / b if ratio else a - b for a, b in known], 1.0 if ratio else 0.0)

    def notes(self) -> list[str]:
        """What a reader should know about these particular runs."""
        results = [outcome.result for outcome in self.outcomes if outcome.result]
        notes = []
        for what, values in (
            ("devices", {result.device for result in results}),
            ("compute types", {result.dtype for result in results}),
            ("numbers of ranks", {result.trained_on for result in results if result.trained_on}),
            ("versions", {", ".join(f"{k} {v}" for k, v in sorted(r.versions.items())) for r in results}),
        ):
            if len(values) > 1:
                notes.append(f"The runs had different {what}: {'; '.join(sorted(values))}.")
        if self.plan.allowed:
            notes.append(f"Allowed to differ: {', '.join(self.plan.allowed)}.")
        return [*notes, *self._at_the_edge()]

    def _at_the_edge(self) -> Iterator[str]:
        """Configs whose best value is the least or the greatest that was tried, so that a better one may lie beyond."""
        for name, value in self.choices.items():
            try:
                numbers = sorted(float(each) for each in self.plan.values(name))
            except ValueError:
                continue
            if len(numbers) > 1 and float(value) in (numbers[0], numbers[-1]):
                key = self.plan.sweeps[name].key
                end = "least" if float(value) == numbers[0] else "greatest"
                yield f"{name} is best at {key} {value}, the {end} value tried: a better one may lie beyond it."

    def raise_for_problems(self) -> None:
        """Raise InterruptedRunError if it was stopped, RunError if a run failed."""
        if self.interruption:
            raise InterruptedRunError(self.interruption)
        failed = [outcome for outcome in self.outcomes if outcome.problem and not self._is_passed_over(outcome)]
        if failed:
            listed = "\n".join(f"  {outcome.run.dir}: {outcome.problem}" for outcome in failed)
            raise RunError(
                f"{len(failed)} of {len(self.outcomes)} runs failed:\n{listed}\n"
                "Repeat the command to try them again; finished runs are kept"
            )

    def _is_passed_over(self, outcome: Outcome) -> bool:
        """Whether it diverged at a value of a sweep, and the config has a better one."""
        name = outcome.run.name
        return outcome.diverged and name in self.choices and outcome.run.value != self.choices[name]


def tried(plan: Plan, outcomes: Mapping[Path, Outcome], name: str) -> list[Tried]:
    """All values of a config's sweep, as far as their outcomes are known."""
    deciding = plan.deciding(name) if name in plan.sweeps else []
    found = []
    for value in plan.values(name) if deciding else []:
        runs = [run for run in deciding if run.value == value]
        known = [outcomes.get(run.dir) or Outcome(run, None, NOT_TRAINED) for run in runs]
        losses = tuple(outcome.result.figures.val_loss for outcome in known if outcome.result)
        problems = tuple(outcome.problem for outcome in known if outcome.problem)
        found.append(Tried(value, losses, problems, any(outcome.diverged for outcome in known)))
    return found


def best(values: Sequence[Tried]) -> str | None:
    """The value with the lowest loss, the first of equals; None if one is not known yet or all are out."""
    losses = [each.loss for each in values]
    if any(map(math.isnan, losses)) or not any(map(math.isfinite, losses)):
        return None
    return values[losses.index(min(losses))].value


def remember_diverged(run: PlannedRun, problem: str) -> None:
    """Write that a run of a sweep diverged."""
    write_json(run.dir / DIVERGED_FILE, {"steps": run.config.training.steps, "problem": problem})


def forget_diverged(run: PlannedRun) -> None:
    """Delete what `remember_diverged` has written."""
    if (run.dir / DIVERGED_FILE).exists():
        remove(run.dir / DIVERGED_FILE)


def diverged_before(run: PlannedRun) -> str | None:
    """Why a run of a sweep diverged in an earlier command; None if it did not, or is of another length now."""
    try:
        found = json.loads(read_bytes(run.dir / DIVERGED_FILE))
        if run.value and found["steps"] == run.config.training.steps:
            return str(found["problem"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None
