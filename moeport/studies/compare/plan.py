"""The runs of a comparison: configs that may differ in what is compared and in nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeport.config import load_config
from moeport.config.schema import Config
from moeport.errors import UserError, choices
from moeport.model.build import build_model
from moeport.studies.compare.fairness import IDLE, Difference, differences, refuse_another, refuse_unfair
from moeport.studies.compare.sweep import ChosenOn, Sweep, Value, folder_suffix, parse_sweeps, value_of

DEFAULTS = ("checkpoint.keep_last=1", "checkpoint.keep_best=false", "metrics.loss_by_frequency=true")
"""Applied to each config before the overrides of the command: many runs should need little disk space."""
SAVES = 20
"""How often a run saves itself if its config names no interval, so that a kill costs little."""
DEFAULT_BASELINE = "topk"


@dataclass(frozen=True)
class PlannedRun:
    """One training run of the comparison."""

    name: str
    """Name of the config: the name of its file without the suffix."""
    config: Config
    value: str = ""
    """That of the swept key; empty without a sweep."""

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
    """All runs that a comparison may need: with a sweep, some seeds of values that are not chosen are never trained."""

    runs: tuple[PlannedRun, ...]
    """Runs in the order of the configs; the seeds of each value stand together."""
    baseline: str
    """Name of the config that the others are compared with."""
    allowed: tuple[str, ...]
    """Keys that the user allows to differ."""
    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    """By name of the config; without those that sweep nothing."""
    chosen_on: ChosenOn = "first"
    """Which seeds tell the best value of a sweep."""

    @property
    def names(self) -> list[str]:
        """The configs in their order."""
        return list(dict.fromkeys(run.name for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """The seeds in their order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def of(self, name: str, value: str | None = None) -> list[PlannedRun]:
        """The runs of a config with one value of its sweep, one per seed; by default with the first value."""
        value = self.values(name)[0] if value is None else value
        return [run for run in self.runs if run.name == name and run.value == value]

    def values(self, name: str) -> list[str]:
        """The values that a config tries, in order; one empty text without a sweep."""
        return list(dict.fromkeys(run.value for run in self.runs if run.name == name))

    def deciding(self, name: str) -> list[PlannedRun]:
        """The runs that tell the best value of a config; all of its runs if it sweeps nothing."""
        runs = [run for value in self.values(name) for run in self.of(name, value)]
        if name not in self.sweeps or self.chosen_on == "all":
            return runs
        return [run for run in runs if run.seed == runs[0].seed]

    def needed(self, choices: Mapping[str, str]) -> list[PlannedRun]:
        """The runs that are known to be needed, in order, where these are the best values by name of the config."""
        runs: dict[Path, PlannedRun] = {}
        for name in self.names:
            runs |= {run.dir: run for run in self.deciding(name)}
            if name in choices:
                runs |= {run.dir: run for run in self.of(name, choices[name])}
        return list(runs.values())

    def count(self, choices: Mapping[str, str]) -> int:
        """The number of runs in all, with those that follow once the other sweeps have chosen."""
        open_ones = [name for name in self.sweeps if name not in choices]
        return len(self.needed(choices)) + sum(len(self.following(name)) for name in open_ones)

    def following(self, name: str) -> list[int]:
        """The seeds that a config is trained with once its best value is chosen."""
        deciding = {run.seed for run in self.deciding(name)}
        return [run.seed for run in self.of(name) if run.seed not in deciding]

    def config(self, name: str) -> Config:
        """The config with a name, with the first seed and value."""
        return self.of(name)[0].config

    def differences(self, name: str) -> list[Difference]:
        """The differences between a config and the baseline, without swept keys."""
        swept = [sweep.key for sweep in self.sweeps.values()]
        return differences(self.config(self.baseline), self.config(name), (*IDLE, *swept))


def plan(
    files: Sequence[Path],
    output_dir: Path,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    sweeps: Sequence[str] = (),
    chosen_on: ChosenOn = "first",
    baseline: str | None = None,
    allowed: Sequence[str] = (),
) -> Plan:
    """Read the configs and check that comparing them is fair.

    Args:
        files: YAML files; their names without the suffix name the runs.
        output_dir: folder of the run folders: `NAME`, with `-KEY-VALUE` for a value of a sweep and `-seed-N` for a
            seed, unless these are the config's own.
        overrides: applied to each config.
        seeds: train each config with each of them; if empty, with its own seed.
        sweeps: `KEY=VALUE,VALUE` for all configs or `NAME:KEY=VALUE,VALUE` for one: values of which each config keeps
            the best.
        chosen_on: which seeds tell the best value.
        baseline: name of a config; default: `topk` if there is one, or else the first.
        allowed: keys, or sections, that may differ besides `model.moe`.

    Raises:
        ConfigError: a config is faulty.
        UserError: two configs have the same name, the baseline is unknown, configs differ in more than `model.moe`,
            or a run folder holds a run of another config.
    """
    by_name = _named(files)
    if baseline is None:
        baseline = DEFAULT_BASELINE if DEFAULT_BASELINE in by_name else next(iter(by_name))
    elif baseline not in by_name:
        raise UserError(f"--baseline {baseline}: no such config; {choices(baseline, by_name)}")
    swept = parse_sweeps(sweeps, by_name)
    given = (*DEFAULTS, *overrides)
    configs = {name: load_config(file, given) for name, file in by_name.items()}
    refuse_unfair(configs, baseline, (*allowed, *(sweep.key for sweep in swept.values())))
    runs: list[PlannedRun] = []
    for name, config in configs.items():
        for value in _values(by_name[name], given, config, swept.get(name)):
            runs += _seeded(name, config, value, seeds, output_dir, swept.get(name))
    _refuse_shared_folders(runs)
    for run in runs:
        refuse_another(run.config)
    return Plan(tuple(runs), baseline, tuple(allowed), swept, chosen_on)


def _named(files: Sequence[Path]) -> dict[str, Path]:
    by_name: dict[str, Path] = {}
    for file in files:
        if file.stem in by_name:
            raise UserError(f"two configs are named {file.stem}: {by_name[file.stem]} and {file}; rename one")
        by_name[file.stem] = file
    return by_name


def _values(file: Path, overrides: Sequence[str], config: Config, sweep: Sweep | None) -> list[Value]:
    """The configs that a sweep makes of one; the config itself without a sweep."""
    if sweep is None:
        return [Value("", config)]
    made = [load_config(file, (*overrides, f"{sweep.key}={value}")) for value in sweep.values]
    return list({value.shown: value for value in (Value(value_of(each, sweep.key), each) for each in made)}.values())


def _seeded(
    name: str, own: Config, value: Value, seeds: Sequence[int], output_dir: Path, sweep: Sweep | None
) -> Iterator[PlannedRun]:
    """The runs of a value, one per seed."""
    folder = name
    if sweep and value.shown != value_of(own, sweep.key):
        folder += folder_suffix(sweep.key, value.shown)
    config = value.config
    checkpoint = config.checkpoint
    if not checkpoint.interval:
        checkpoint = checkpoint.model_copy(update={"interval": -(-config.training.steps // SAVES)})
    for seed in dict.fromkeys(seeds) or (own.training.seed,):
        seeded = folder if seed == own.training.seed else f"{folder}-seed-{seed}"
        sections = {
            "run": config.run.model_copy(update={"dir": output_dir / seeded}),
            "training": config.training.model_copy(update={"seed": seed}),
            "checkpoint": checkpoint,
        }
        yield PlannedRun(name, config.model_copy(update=sections), value.shown)


def _refuse_shared_folders(runs: Sequence[PlannedRun]) -> None:
    """Refuse names of configs that make one folder of two runs, such as `a` with seed 1 and `a-seed-1`."""
    owners: dict[Path, str] = {}
    for run in runs:
        if run.dir in owners:
            raise UserError(
                f"{owners[run.dir]} and {run.name} would both train in {run.dir}; rename one of the configs"
            )
        owners[run.dir] = run.name


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
