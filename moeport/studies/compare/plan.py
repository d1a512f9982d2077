"""The runs of a comparison: configs that may differ in what is compared and in nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeport.config import config_from_dict, load_config
from moeport.config.schema import Config
from moeport.config.tree import shown
from moeport.errors import UserError, choices
from moeport.model.build import build_model
from moeport.training.checkpoint import list_checkpoints, read_meta
from moeport.training.run_dir import CHECKPOINT_DIR, CONFIG_FILE, read_config

COMPARED = ("model.moe",)
"""Keys that a comparison is about."""
IDLE = ("run", "checkpoint", "metrics")
"""Keys that do not affect anything that is measured."""
DEFAULTS = ("checkpoint.keep_last=1", "checkpoint.keep_best=false")
"""Applied to each config before the overrides of the command: many runs should need little disk space."""
DEFAULT_BASELINE = "topk"
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


@dataclass(frozen=True)
class PlannedRun:
    """One training run of the comparison."""

    name: str
    """Name of the config: the name of its file without the suffix."""
    config: Config

    @property
    def seed(self) -> int:
        """Determines initial weights, data order and noise."""
        return self.config.training.seed

    @property
    def dir(self) -> Path:
        """The run folder."""
        return self.config.run.dir


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison."""

    runs: tuple[PlannedRun, ...]
    """Runs in the order of the configs; the seeds of each config stand together."""
    baseline: str
    """Name of the config that the others are compared with."""
    allowed: tuple[str, ...]
    """Keys that the user allows to differ."""

    @property
    def names(self) -> list[str]:
        """The configs in their order."""
        return list(dict.fromkeys(run.name for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """The seeds in their order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def of(self, name: str) -> list[PlannedRun]:
        """The runs of a config, one per seed."""
        return [run for run in self.runs if run.name == name]

    def config(self, name: str) -> Config:
        """The config with a name, and with the first seed."""
        return self.of(name)[0].config

    def differences(self, name: str) -> list[Difference]:
        """The differences between a config and the baseline."""
        return _differences(self.config(self.baseline), self.config(name), IDLE)


def plan(
    files: Sequence[Path],
    output_dir: Path,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    baseline: str | None = None,
    allowed: Sequence[str] = (),
) -> Plan:
    """Read the configs and check that comparing them is fair.

    Args:
        files: YAML files; their names without the suffix name the runs.
        output_dir: folder of the run folders: `NAME`, or `NAME-seed-N` for a seed that is not the config's own.
        overrides: applied to each config.
        seeds: train each config with each of them; if empty, with its own seed.
        baseline: name of a config; default: `topk` if there is one, or else the first.
        allowed: keys, or sections, that may differ besides `model.moe`.

    Raises:
        ConfigError: a config is faulty.
        UserError: two configs have the same name, the baseline is unknown, configs differ in more than `model.moe`,
            or a run folder holds a run of another config.
    """
    by_name: dict[str, Path] = {}
    for file in files:
        if file.stem in by_name:
            raise UserError(f"two configs are named {file.stem}: {by_name[file.stem]} and {file}; rename one")
        by_name[file.stem] = file
    if baseline is None:
        baseline = DEFAULT_BASELINE if DEFAULT_BASELINE in by_name else next(iter(by_name))
    elif baseline not in by_name:
        raise UserError(f"--baseline {baseline}: no such config; {choices(baseline, by_name)}")
    configs = {name: load_config(file, (*DEFAULTS, *overrides)) for name, file in by_name.items()}
    _refuse_unfair(configs, baseline, allowed)
    runs = []
    for name, config in configs.items():
        for seed in dict.fromkeys(seeds) or (config.training.seed,):
            folder = name if seed == config.training.seed else f"{name}-seed-{seed}"
            sections = {
                "run": config.run.model_copy(update={"dir": output_dir / folder}),
                "training": config.training.model_copy(update={"seed": seed}),
            }
            runs.append(PlannedRun(name, config.model_copy(update=sections)))
    for run in runs:
        _refuse_another(run)
    return Plan(tuple(runs), baseline, tuple(allowed))


def shared_parameters(config: Config, baseline: Config, vocab_size: int) -> tuple[int, int, list[str]]:
    """How many of a model's parameters start with the same values as the baseline's.

    Initial values depend only on a parameter's spec and the seed (`moeport.core.parameters`), so parameters with equal
    specs start equal.

    Args:
        config: the config.
        baseline: the config it is compared with.
        vocab_size: that of the tokenizer; 0 without one.

    Returns: (numbers that start equal, all numbers, names of the other parameters with * for the layer).
    """
    own, others = (
        {spec.name: spec for spec in build_model(c.model, c.data, vocab_size).parameter_specs()}
        for c in (config, baseline)
    )
    equal = {name for name, spec in own.items() if others.get(name) == spec}
    if config.training.seed != baseline.training.seed:
        equal = {name for name in equal if own[name].init in ("ones", "zeros")}
    rest = dict.fromkeys(
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in own if name not in equal
    )
    return sum(own[name].size for name in equal), sum(spec.size for spec in own.values()), list(rest)


def _refuse_unfair(configs: dict[str, Config], baseline: str, allowed: Sequence[str]) -> None:
    faults = [
        f"{name}: {difference.key} is {difference.now}, but {difference.before} in {baseline}"
        for name, config in configs.items()
        for difference in _differences(configs[baseline], config, (*COMPARED, *IDLE, *allowed))
    ]
    if faults:
        raise UserError(
            "the configs may differ only in model.moe, or the comparison would say nothing about it:\n  "
            + "\n  ".join(faults)
            + "\nmake them equal with --set KEY=VALUE for all, or allow a key to differ with --allow-different KEY"
        )


def _refuse_another(run: PlannedRun) -> None:
    """Refuse a folder with a run of another config: it can neither be resumed nor count as a result."""
    before = _config_in(run.dir)
    if before is None:
        return
    config = run.config
    if config.backend.dtype == "auto":
        config = config.model_copy(
            update={"backend": config.backend.model_copy(update={"dtype": before.backend.dtype})}
        )
    found = _differences(before, config, IDLE)
    if found:
        raise UserError(
            f"{run.dir} holds a run of another config: {'; '.join(map(str, found))}; "
            "choose another --output-dir, delete this folder, or restore these keys"
        )


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
        return config_from_dict(read_meta(paths[-1]).config)


def _differences(before: Config, now: Config, without: Sequence[str]) -> list[Difference]:
    """Keys whose values differ, except those in the given sections."""
    values = [dict(_leaves(config.model_dump(mode="json"))) for config in (before, now)]
    return [
        Difference(key, *(_shown(value[key]) if key in value else ABSENT for value in values))
        for key in dict.fromkeys([*values[0], *values[1]])
        if not any(f"{key}.".startswith(f"{section}.") for section in without)
        and (key not in values[0] or key not in values[1] or values[0][key] != values[1][key])
    ]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, list) else shown(value)
