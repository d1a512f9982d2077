"""What may differ between the configs of a comparison, and between a run folder and its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeport.config import config_from_dict
from moeport.config.schema import Config
from moeport.config.tree import shown
from moeport.errors import UserError
from moeport.training.checkpoint import list_checkpoints, read_meta
from moeport.training.resumable import rate_changed
from moeport.training.run_dir import CHECKPOINT_DIR, CONFIG_FILE, leaves, read_config
from moeport.training.schedule import learning_rate

COMPARED = ("model.moe",)
"""Keys that a comparison is about."""
IDLE = ("run", "checkpoint", "metrics")
"""Keys that do not affect anything that is measured."""
LENGTH = ("training.steps", "optimizer.schedule.steps")
"""Keys with which a run may be continued."""
ABSENT = "-"


@dataclass(frozen=True)
class Difference:
    """A key with two values."""

    key: str
    before: str
    """The baseline's value, or the earlier one; ABSENT if there is no such key."""
    now: str

    def __str__(self) -> str:
        if self.now == ABSENT:
            return f"no {self.key}"
        return f"{self.key} {self.now if self.before == ABSENT else f'{self.before} -> {self.now}'}"


def differences(before: Config, now: Config, without: Sequence[str]) -> list[Difference]:
    """Keys whose values differ, except those in the given sections."""
    values = [leaves(config.model_dump(mode="json")) for config in (before, now)]
    return [
        Difference(key, *(_shown(value[key]) if key in value else ABSENT for value in values))
        for key in dict.fromkeys([*values[0], *values[1]])
        if not any(f"{key}.".startswith(f"{section}.") for section in without)
        and (key not in values[0] or key not in values[1] or values[0][key] != values[1][key])
    ]


def refuse_unfair(configs: Mapping[str, Config], baseline: str, allowed: Sequence[str]) -> None:
    """Raise UserError if configs differ from the baseline in more than COMPARED, IDLE and what is allowed."""
    faults = [
        f"{name}: {difference.key} is {difference.now}, but {difference.before} in {baseline}"
        for name, config in configs.items()
        for difference in differences(configs[baseline], config, (*COMPARED, *IDLE, *allowed))
    ]
    if faults:
        raise UserError(
            "the configs may differ only in model.moe, or the comparison would say nothing about it:\n  "
            + "\n  ".join(faults)
            + "\nmake them equal with --set KEY=VALUE for all, or allow a key to differ with --allow-different KEY"
        )


def refuse_another(config: Config) -> None:
    """Refuse a run folder with a run of another config: it can neither be resumed nor count as a result.

    A run of another length is continued if it has the same learning rates in the steps done.
    """
    folder = config.run.dir
    before = _config_in(folder)
    if before is None:
        return
    if config.backend.dtype == "auto":
        config = config.model_copy(
            update={"backend": config.backend.model_copy(update={"dtype": before.backend.dtype})}
        )
    found = differences(before, config, (*IDLE, *LENGTH))
    if not found and (reason := _other_rates(before, config)):
        raise UserError(
            f"{folder} holds a run of {before.training.steps} steps: {reason}; choose another --output-dir, or delete "
            "this folder. Runs that may become longer need --set optimizer.schedule.steps=N from the start, or a "
            "constant rate"
        )
    if not found:
        return
    raise UserError(
        f"{folder} holds a run of another config: {'; '.join(map(str, found))}; "
        "choose another --output-dir, delete this folder, or restore these keys"
    )


def _other_rates(before: Config, config: Config) -> str:
    """Why a run cannot be continued to another length; empty if it can."""
    paths = list_checkpoints(config.run.dir / CHECKPOINT_DIR)
    done, steps = read_meta(paths[-1]).step if paths else 0, config.training.steps
    if done > steps:
        return f"{done} of them are done, which is more than {steps}"
    if before.optimizer == config.optimizer:
        return rate_changed(config.optimizer, done, before.training.steps, steps)
    was, now = (learning_rate(each.optimizer, max(0, done - 1), each.training.steps) for each in (before, config))
    return f"with another optimizer.schedule.steps the rate of step {done} was {was:.3g}, not {now:.3g}" * (was != now)


def _config_in(run_dir: Path) -> Config | None:
    """The config of the run in a folder, from its newest checkpoint if the file is damaged; None if there is no run."""
    if not (run_dir / CONFIG_FILE).exists():
        return None
    try:
        return read_config(run_dir)
    except UserError:
        paths = list_checkpoints(run_dir / CHECKPOINT_DIR)
        if not paths:
            raise
        return config_from_dict(read_meta(paths[-1]).config, recorded=True)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, list) else shown(value)
