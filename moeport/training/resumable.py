"""Which keys of the config a resumed run may change, and what a change does: a table of all keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from moeport.config import config_from_dict
from moeport.config.schema import Config
from moeport.config.step_ranges import shown, up_to
from moeport.config.training import OptimizerConfig, TrainingConfig
from moeport.data import Dealing
from moeport.errors import ConfigError, UserError
from moeport.training.checkpoint import Checkpoint
from moeport.training.run_dir import leaves
from moeport.training.schedule import decay_start, learning_rate


class Effect(Enum):
    """What a changed key does to a resumed run."""

    NONE = "free"
    """The training steps stay the same."""
    ONWARD = "from here on"
    """The steps that are not done yet follow the new value."""
    REFUSED = "refused"
    """The run would have another model or see other batches, so it is not the same run."""


@dataclass(frozen=True)
class Rule:
    """What holds for a key and, unless they have a rule of their own, for the keys below it."""

    effect: Effect
    why: str


RULES: Mapping[str, Rule] = {
    "run": Rule(Effect.NONE, "the folder may have been moved"),
    "model": Rule(Effect.REFUSED, "it would be another model"),
    "model.moe.router.nodes": Rule(Effect.ONWARD, "the same parameters; every domain must keep its share"),
    "model.moe.router_dtype": Rule(Effect.ONWARD, "equal up to rounding"),
    "model.moe.capacity.rule": Rule(Effect.ONWARD, "applies to later estimates"),
    "model.moe.capacity.delta": Rule(Effect.ONWARD, "applies to later estimates"),
    "model.moe.capacity.quantile": Rule(Effect.ONWARD, "applies to later estimates"),
    "model.embedding_std": Rule(Effect.NONE, "the weights are those of the checkpoint"),
    "data": Rule(Effect.REFUSED, "other batches, or another evaluation"),
    "data.objective.steps": Rule(Effect.ONWARD, "refused if it changes the objective of steps that are done"),
    "data.root": Rule(Effect.NONE, "the text and its names below it are compared"),
    "data.cache_dir": Rule(Effect.NONE, "the text and the tokenizer are compared"),
    "training.steps": Rule(
        Effect.ONWARD, "refused if it changes the learning rates of steps that are done, or if more steps are done"
    ),
    "training.batch_size": Rule(Effect.REFUSED, "other batches"),
    "training.gradient_accumulation": Rule(Effect.ONWARD, "the same batches, divided differently"),
    "training.seed": Rule(Effect.REFUSED, "other batches"),
    "training.start_from": Rule(Effect.NONE, "the weights are those of the checkpoint"),
    "training.evaluation_interval": Rule(Effect.NONE, "evaluations leave no trace in the model"),
    "training.evaluation_batch_size": Rule(Effect.NONE, "evaluations leave no trace in the model"),
    "training.activation_checkpointing": Rule(Effect.ONWARD, "equal up to rounding"),
    "training.skip_steps": Rule(Effect.ONWARD, "refused for steps that are done"),
    "optimizer": Rule(Effect.ONWARD, "the moments are kept"),
    "optimizer.schedule": Rule(Effect.ONWARD, "the learning rate may jump"),
    "optimizer.name": Rule(Effect.REFUSED, "it keeps other moments"),
    "parallelism": Rule(Effect.ONWARD, "equal up to rounding"),
    "comm": Rule(Effect.ONWARD, "equal up to rounding"),
    "checkpoint": Rule(Effect.NONE, "checkpoints leave no trace in the model"),
    "metrics": Rule(Effect.NONE, "metrics leave no trace in the model"),
    "backend": Rule(Effect.ONWARD, "the checkpoint is the same for every framework, device and type"),
}
"""By key or section; the longest entry that fits a key holds."""


SCHEDULE = ("optimizer.schedule.", "optimizer.learning_rate")
"""Beginnings of the keys that give the learning rate."""


@dataclass(frozen=True)
class Change:
    """A key whose value is not that of the checkpoint."""

    key: str
    before: Any
    now: Any

    @property
    def effect(self) -> Effect:
        """What it does."""
        return rule_of(self.key).effect

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}"


def rate_changed(optimizer: OptimizerConfig, done: int, before: int, now: int) -> str:
    """Why a run of another number of steps is not the one that was begun; empty if it is.

    It is if both have the same learning rates in the steps done: always with a constant rate, with `wsd` before the
    decay, or where the schedule has a length of its own.

    Args:
        optimizer: with the schedule of both.
        done: the number of steps done.
        before: the number of steps that was planned.
        now: the number of steps that the run is to have.
    """
    if not done:
        return ""
    was, would_be = (learning_rate(optimizer, done - 1, steps) for steps in (before, now))
    if was == would_be:
        return ""
    return (
        f"the {optimizer.schedule.name} schedule of {before} steps has the learning rate {was:.3g} in step {done}, the "
        f"last one done, and one of {now} steps would have had {would_be:.3g}, so the run would be neither of the two"
    )


def _check_length(config: Config, found: Sequence[Change], done: int) -> None:
    """Refuse another number of steps with which the rate would jump, unless the schedule or the rate is changed too."""
    length = next((change for change in found if change.key == "training.steps"), None)
    if length is None or any(change.key.startswith(SCHEDULE) for change in found):
        return
    optimizer, before, now = config.optimizer, length.before, length.now
    reason = rate_changed(optimizer, done, before, now)
    if not reason:
        return
    kept = before > now or optimizer.schedule.final_fraction > 0
    ways = [f"to keep the rates that were planned, --set optimizer.schedule.steps={before}"] if kept else []
    if optimizer.schedule.name == "wsd":
        start = min(decay_start(optimizer, steps) for steps in (before, now))
        ways.append(f"to continue from before the decay, delete the checkpoints after step {start}")
    ways.append(f"to let the rate jump, --set optimizer.schedule.steps={now}")
    ways.append(
        f"to start another run from these weights, --set training.start_from={config.run.dir} --set run.dir=FOLDER, "
        "without --resume"
    )
    raise UserError(f"training.steps: {before} -> {now}: {reason}; expected {before}, or {'; '.join(ways)}")


def rule_of(key: str) -> Rule:
    """The rule that holds for a key."""
    parts = key.split(".")
    return next(RULES[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in RULES)


def changes(config: Config, checkpoint: Checkpoint) -> list[Change]:
    """The keys that have other values than in a checkpoint; a key that is younger than it had its default."""
    now = leaves(config.model_dump(mode="json"))
    try:
        before = leaves(config_from_dict(checkpoint.meta.config, recorded=True).model_dump(mode="json"))
    except ConfigError:  # of an older moeport, whose keys or rules were others
        before = now | leaves(checkpoint.meta.config)
    return [
        Change(key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def with_former_defaults(config: Config, checkpoint: Checkpoint) -> Config:
    """The config with the checkpoint's values of the router's `new_defaults` that the config leaves open."""
    now = config.model.moe.router
    try:
        before = config_from_dict(checkpoint.meta.config, recorded=True).model.moe.router
    except ConfigError:  # of an older moeport, whose keys or rules were others
        return config
    if type(before) is not type(now):
        return config
    kept = {key: getattr(before, key) for key in now.new_defaults if not now.gives(key)}
    moe = config.model.moe.model_copy(update={"router": now.model_copy(update=kept)})
    return config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})


def check_resumable(config: Config, checkpoint: Checkpoint) -> list[Change]:
    """Compare the config with the checkpoint's.

    Returns: the changes that are allowed.

    Raises UserError, which names the changes that are not, with both values.
    """
    found = changes(config, checkpoint)
    refused = [str(change) for change in found if change.effect is Effect.REFUSED]
    if refused:
        raise UserError(
            f"{checkpoint.path}: cannot be resumed with another model, data or optimiser: {'; '.join(refused)}; "
            "restore these keys, or start another run with --set run.dir=FOLDER"
        )
    _check_steps(config, checkpoint)
    _check_objective(found, checkpoint)
    _check_length(config, found, checkpoint.meta.step)
    return found


def check_dealing(checkpoint: Checkpoint, dealing: Dealing) -> None:
    """Refuse nodes on which a step would draw other numbers of sequences of the domains than before.

    Raises UserError, which states the numbers.
    """
    before, now = checkpoint.meta.domains, dealing.counts
    if before is None or before == now:
        return
    was, would = (", ".join(f"{name} {count}" for name, count in counts.items()) for counts in (before, now))
    raise UserError(
        f"{checkpoint.path}: data.domains: each step drew {was} sequences, and on the nodes of this job it would draw "
        f"{would}, so the run cannot be resumed exactly; resume it on as many nodes as before, with any number of "
        "ranks on each, or simulate them with model.moe.router.nodes, or start another run with --set run.dir=FOLDER"
    )


def announced(found: list[Change], step: int, steps: int) -> list[str]:
    """A line for each change, except of the folder, that says what it does.

    Args:
        found: the changes, none of which is refused.
        step: the number of steps done.
        steps: the number of steps of the run.
    """
    lines = []
    for change in found:
        if change.key.startswith("run."):
            continue
        if step >= steps and change.effect is Effect.ONWARD:
            lines.append(f"no effect, since all {steps} steps are done: {change}")
        elif change.key == "metrics.profile_step" and change.now is not None and change.now <= step:
            lines.append(f"no effect, since step {change.now} is done: {change}")
        elif change.effect is Effect.ONWARD:
            lines.append(f"changed from step {step + 1} on: {change}")
        else:
            lines.append(f"changed since the checkpoint: {change}")
    return lines


def _check_steps(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse to end before the steps that are done, and to skip them or not to have skipped them."""
    done, training = checkpoint.meta.step, config.training
    if training.steps < done:
        raise UserError(
            f"training.steps: {training.steps} is less than the {done} steps that are done ({checkpoint.path}); "
            f"expected at least {done}, or delete the later checkpoints, or start another run with "
            "--set run.dir=FOLDER"
        )
    was, now = (up_to(section.skipped, done) for section in (_training(checkpoint), training))
    if was != now:
        raise UserError(
            f"training.skip_steps: of the {done} steps that are done, {shown(was) or 'none'} were skipped and "
            f"{shown(now) or 'none'} should have been ({checkpoint.path}); change steps after {done} only, or delete "
            "the later checkpoints"
        )


def _check_objective(found: Sequence[Change], checkpoint: Checkpoint) -> None:
    """Refuse to have trained steps that are done with another objective."""
    change = next((change for change in found if change.key == "data.objective.steps"), None)
    done = checkpoint.meta.step
    if change is None or all(steps is None or steps >= done for steps in (change.before, change.now)):
        return
    kept = f"expected {change.before}" if (change.before or done) < done else f"expected at least {done}, or null"
    raise UserError(
        f"{change}: of the {done} steps that are done, others would have been trained with the mixture "
        f"({checkpoint.path}); {kept}, or delete the later checkpoints"
    )


def _training(checkpoint: Checkpoint) -> TrainingConfig:
    """What was skipped before a checkpoint; nothing if it is older than the key."""
    values = checkpoint.meta.config.get("training", {})
    return TrainingConfig(skip_steps=tuple(values.get("skip_steps", ())))
