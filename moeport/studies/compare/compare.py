"""Train several configs that differ in their MoE layers, one after another, and compare the results."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moeport.errors import InterruptedRunError, MoeportError, RunError
from moeport.pages.console import PlainConsole
from moeport.studies.compare.figures import Figures, RunResult, is_finished, read_result
from moeport.studies.compare.plan import ABSENT, Plan, PlannedRun, shared_parameters
from moeport.training.checkpoint import list_checkpoints, read_meta
from moeport.training.duration import duration
from moeport.training.run import train
from moeport.training.run_dir import CHECKPOINT_DIR
from moeport.training.task import build_task

NOT_TRAINED = "not trained yet"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run."""

    run: PlannedRun
    result: RunResult | None
    problem: str
    """The reason if there is no result; otherwise empty."""


@dataclass(frozen=True)
class Comparison:
    """All runs and their outcomes."""

    plan: Plan
    outcomes: tuple[Outcome, ...]
    ranks: int
    """N of the all-to-all."""
    data: str
    """Describes the training data."""
    interruption: str
    """Where it was stopped; empty if it was not."""

    def of(self, name: str) -> list[Outcome]:
        """The outcomes of a config, one per seed."""
        return [outcome for outcome in self.outcomes if outcome.run.name == name]

    def figures(self, name: str) -> dict[int, Figures]:
        """Figures of a config's finished runs, by seed."""
        return {outcome.run.seed: outcome.result.figures for outcome in self.of(name) if outcome.result}

    def notes(self) -> list[str]:
        """What a reader should know about these particular runs."""
        results = [outcome.result for outcome in self.outcomes if outcome.result]
        notes = []
        for what, values in (
            ("devices", {result.device for result in results}),
            ("compute types", {result.dtype for result in results}),
            ("versions", {", ".join(f"{k} {v}" for k, v in sorted(r.versions.items())) for r in results}),
        ):
            if len(values) > 1:
                notes.append(f"The runs had different {what}: {'; '.join(sorted(values))}.")
        if self.plan.allowed:
            notes.append(f"Allowed to differ: {', '.join(self.plan.allowed)}.")
        return notes

    def raise_for_problems(self) -> None:
        """Raise InterruptedRunError if it was stopped, RunError if a run failed."""
        if self.interruption:
            raise InterruptedRunError(self.interruption)
        failed = [outcome for outcome in self.outcomes if outcome.problem]
        if failed:
            listed = "\n".join(f"  {outcome.run.dir}: {outcome.problem}" for outcome in failed)
            raise RunError(
                f"{len(failed)} of {len(self.outcomes)} runs failed:\n{listed}\n"
                "Repeat the command to try them again; finished runs are kept"
            )


def compare(plan: Plan, *, ranks: int = 8, console: Console | None = None) -> Comparison:
    """Train the runs that are not finished, one after another.

    A finished run is read, not trained again; a stopped one resumes from its last checkpoint. A run that fails does not
    stop the others; an interruption does.

    Args:
        plan: the runs.
        ranks: N, the number of ranks assumed for the bytes of the all-to-all.
        console: where progress goes; default standard output.

    Raises:
        DataError: the data cannot be read.
    """
    console = console or PlainConsole()

    def say(text: str = "") -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    baseline = plan.config(plan.baseline)
    task = build_task(baseline, report=say)
    for name in plan.names:
        found = [str(difference) for difference in plan.differences(name) if difference.now != ABSENT]
        say(f"{name}: {'; '.join(found) or _equal(name, plan)}")
        same, total, own = shared_parameters(plan.config(name), baseline, task.vocab_size)
        rest = f"; its own: {', '.join(own)}" if own else ""
        say(f"    {same:,} of {total:,} parameters start as in {plan.baseline}{rest}")
    finished = [run for run in plan.runs if is_finished(run.dir)]
    outcomes = {run.dir: _outcome(run, ranks) for run in finished}
    waiting = [run for run in plan.runs if run.dir not in outcomes]
    say(f"{len(plan.runs)} runs, {len(finished)} of them already finished" if finished else f"{len(plan.runs)} runs")
    interruption = ""
    for index, run in enumerate(waiting):
        say(f"\nrun {index + 1} of {len(waiting)}: {run.name}, seed {run.seed}{_left(outcomes, len(waiting) - index)}")
        try:
            train(run.config, resume=True, console=console)
        except InterruptedRunError:
            interruption = (
                f"stopped in run {index + 1} of {len(waiting)}, {run.name}; everything is saved in {run.dir.parent}. "
                "Repeat the command to continue"
            )
            break
        except Exception as error:  # whatever it is, the other runs can continue
            outcomes[run.dir] = Outcome(run, None, f"{type(error).__name__}: {error}")
            say(f"failed: {outcomes[run.dir].problem}")
            if not isinstance(error, MoeportError):
                say(traceback.format_exc())
        else:
            outcomes[run.dir] = _outcome(run, ranks)
    ordered = _of_same_data(tuple(outcomes.get(run.dir) or Outcome(run, None, NOT_TRAINED) for run in plan.runs), plan)
    kind, description = task.describe().split(maxsplit=1)
    return Comparison(plan, ordered, ranks, f"{kind}: {description}", interruption)


def _equal(name: str, plan: Plan) -> str:
    return "the baseline" if name == plan.baseline else "same as the baseline"


def _outcome(run: PlannedRun, ranks: int) -> Outcome:
    return Outcome(run, read_result(run.dir, run.config, ranks), "")


def _left(outcomes: Mapping[Path, Outcome], waiting: int) -> str:
    """Estimates the time left from the finished runs."""
    seconds = [outcome.result.figures.wall_time for outcome in outcomes.values() if outcome.result]
    return f", about {duration(sum(seconds) / len(seconds) * waiting)} left in total" if seconds else ""


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
                outcome = Outcome(outcome.run, None, wrong)
        checked.append(outcome)
    return tuple(checked)
