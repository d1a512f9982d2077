"""Train several configs that differ in their MoE layers, one after another, and compare the results."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moeport.errors import InterruptedRunError, MoeportError, NonFiniteError
from moeport.pages.console import PlainConsole
from moeport.studies.compare.fairness import ABSENT
from moeport.studies.compare.figures import is_finished, read_result
from moeport.studies.compare.outcome import (
    Comparison,
    Outcome,
    best,
    diverged_before,
    forget_diverged,
    remember_diverged,
    tried,
)
from moeport.studies.compare.plan import Plan, PlannedRun, shared_parameters
from moeport.studies.compare.time_left import time_left
from moeport.training.checkpoint import list_checkpoints, read_meta
from moeport.training.run import train
from moeport.training.run_dir import CHECKPOINT_DIR
from moeport.training.task import build_task

Train = Callable[[PlannedRun, Console], None]
"""Trains a run to its end, from its last checkpoint if it has one; raises what `moeport.training.run.train` raises."""
Say = Callable[[str], None]


def train_here(run: PlannedRun, console: Console) -> None:
    """Train a run in this process."""
    train(run.config, resume=True, console=console)


def compare(
    plan: Plan,
    *,
    ranks: int = 8,
    console: Console | None = None,
    train_run: Train = train_here,
    after_each: Callable[[Comparison], object] | None = None,
) -> Comparison:
    """Train the runs that are not finished, one after another.

    A finished run is read, not trained again; a stopped one, even by a kill, resumes from its last checkpoint. A run
    that fails does not stop the others; an interruption does. With a sweep, a config is first trained with the seeds
    that decide, and then with the others at its best value.

    Args:
        plan: the runs.
        ranks: N, the number of ranks assumed for the bytes of the all-to-all.
        console: where progress goes; default standard output.
        train_run: how a run is trained.
        after_each: is given the comparison so far after each run.

    Raises:
        DataError: the data cannot be read.
    """
    console = console or PlainConsole()

    def say(text: str = "") -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    data = _introduce(plan, say)
    series = _Series(plan, ranks, console, say, train_run, data)
    for run in series.needed():
        try:
            series.train(run)
        except InterruptedRunError:
            return series.comparison(series.interruption(run))
        if after_each:
            after_each(series.comparison())
    return series.comparison()


def _introduce(plan: Plan, say: Say) -> str:
    """Say how the configs differ and what they share. Returns a description of the data."""
    baseline = plan.config(plan.baseline)
    task = build_task(baseline, report=say)
    for name in plan.names:
        found = [str(difference) for difference in plan.differences(name) if difference.now != ABSENT]
        equal = "the baseline" if name == plan.baseline else "same as the baseline"
        say(f"{name}: {'; '.join(found) or equal}")
        same, total, own = shared_parameters(plan.config(name), baseline, task.vocab_size)
        rest = f"; its own: {', '.join(own)}" if own else ""
        say(f"    {same:,} of {total:,} parameters start as in {plan.baseline}{rest}")
    kind, description = task.describe().split(maxsplit=1)
    return f"{kind}: {description}"


class _Series:
    """The runs of a plan, one after another."""

    def __init__(self, plan: Plan, ranks: int, console: Console, say: Say, train_run: Train, data: str):
        self.plan, self.ranks, self.console, self.say = plan, ranks, console, say
        self.train_run, self.data = train_run, data
        self.outcomes: dict[Path, Outcome] = {}
        self.choices: dict[str, str] = {}
        for run in plan.runs:
            if outcome := self._known(run):
                self.outcomes[run.dir] = outcome
        for name in plan.sweeps:
            self._choose(name)
        already = f", {self._done()} of them already finished" if self._done() else ""
        say(f"{plan.count(self.choices)} runs{already}")
        for name in self.choices:
            self._say_choice(name)

    def needed(self) -> Iterator[PlannedRun]:
        """The runs that have to be trained, in order; what a sweep chooses is known once its runs have been."""
        for name in self.plan.names:
            for run in self.plan.deciding(name):
                if run.dir not in self.outcomes:
                    yield run
            if name in self.plan.sweeps and name not in self.choices:
                self._choose(name)
                if name not in self.choices:
                    self.say(f"{name}: no value of {self.plan.sweeps[name].key} can be chosen, so no other seed is run")
                    continue
                self._say_choice(name)
            for run in self.plan.of(name, self.choices.get(name)):
                if run.dir not in self.outcomes:
                    yield run

    def train(self, run: PlannedRun) -> None:
        """Train a run and keep its outcome; raises InterruptedRunError only."""
        left = time_left(self.plan, self.outcomes, self.choices)
        value = f", {self.plan.sweeps[run.name].key} {run.value}" if run.value else ""
        self.say(f"\nrun {self._place()}: {run.name}, seed {run.seed}{value}{left}")
        forget_diverged(run)
        try:
            self.train_run(run, self.console)
        except InterruptedRunError:
            raise
        except Exception as error:  # whatever it is, the other runs can continue
            diverged = isinstance(error, NonFiniteError)
            problem = f"{type(error).__name__}: {error}"
            self.outcomes[run.dir] = Outcome(run, None, problem, diverged)
            if diverged and run.value:
                remember_diverged(run, problem)
            self.say(f"failed: {problem}")
            if not isinstance(error, MoeportError):
                self.say(traceback.format_exc())
        else:
            self.outcomes[run.dir] = Outcome(run, read_result(run.dir, run.config, self.ranks), "")

    def comparison(self, interruption: str = "") -> Comparison:
        """What is known so far."""
        ordered = [self.outcomes[run.dir] for run in self.plan.runs if run.dir in self.outcomes]
        checked = {outcome.run.dir: outcome for outcome in _of_same_data(ordered, self.plan)}
        return Comparison(self.plan, checked, self.ranks, self.data, interruption, dict(self.choices))

    def interruption(self, run: PlannedRun) -> str:
        """Where it was stopped."""
        return (
            f"stopped in run {self._place()}, {run.name}; everything is saved in {run.dir.parent}. "
            "Repeat the command to continue"
        )

    def _done(self) -> int:
        return sum(run.dir in self.outcomes for run in self.plan.needed(self.choices))

    def _place(self) -> str:
        return f"{self._done() + 1} of {self.plan.count(self.choices)}"

    def _known(self, run: PlannedRun) -> Outcome | None:
        """The outcome of a run that need not be trained."""
        if is_finished(run.dir, run.config.training.steps):
            return Outcome(run, read_result(run.dir, run.config, self.ranks), "")
        problem = diverged_before(run)
        return Outcome(run, None, problem, diverged=True) if problem else None

    def _choose(self, name: str) -> None:
        chosen = best(tried(self.plan, self.outcomes, name))
        if chosen is not None:
            self.choices[name] = chosen

    def _say_choice(self, name: str) -> None:
        losses = ", ".join(f"{each.value}: {each.loss:.4f}" for each in tried(self.plan, self.outcomes, name))
        self.say(f"{name}: {self.plan.sweeps[name].key} {self.choices[name]} is the best of {losses}")


def _of_same_data(outcomes: Sequence[Outcome], plan: Plan) -> tuple[Outcome, ...]:
    """Turns results of runs that saw other data than the first one into problems: files may change between commands."""
    if any(key.partition(".")[0] == "data" for key in plan.allowed):
        return tuple(outcomes)
    checked, first = [], None
    for outcome in outcomes:
        paths = list_checkpoints(outcome.run.dir / CHECKPOINT_DIR) if outcome.result else []
        if paths:
            meta = read_meta(paths[-1])
            seen = (meta.tokenizer, meta.data)
            first = first or (outcome.run.dir, seen)
            if seen != first[1]:
                wrong = f"trained on other data than {first[0]}; delete one of the two and repeat the command"
                outcome = replace(outcome, result=None, problem=wrong)
        checked.append(outcome)
    return tuple(checked)
