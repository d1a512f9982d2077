"""The checkpoints of a run, as what can be walked through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moeport.backends import get_backend
from moeport.backends.base import Backend
from moeport.config import config_from_dict
from moeport.config.schema import Config
from moeport.config.training import BackendConfig
from moeport.data import Tokenizer
from moeport.errors import UserError
from moeport.model.decoder import DecoderLM
from moeport.studies.inspect.options import Options
from moeport.studies.inspect.texts import Portion
from moeport.studies.inspect.walk import Walk
from moeport.training.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from moeport.training.fits import check_parameters, finite
from moeport.training.run_dir import CHECKPOINT_DIR
from moeport.training.trained import opened_text


@dataclass(frozen=True)
class Opened:
    """A run whose checkpoints are looked at."""

    run_dir: Path
    config: Config
    """With the capacity and the length of sequences that the options ask for."""
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    """The one that is looked at closely."""
    earlier: Sequence[Path]
    """Checkpoints before it, evenly chosen, oldest first."""
    backend: Backend

    @property
    def lm(self) -> DecoderLM:
        """The model's shapes."""
        return DecoderLM(self.config.model, self.tokenizer.vocab_size)

    def walk(
        self,
        portions: Sequence[Portion],
        checkpoint: Checkpoint | None = None,
        without_first_choice: bool = False,
        report: Callable[[str], None] = lambda _: None,
    ) -> Walk:
        """One pass of a text through a checkpoint.

        Args:
            portions: the text.
            checkpoint: None: the one that is looked at closely.
            without_first_choice: as of `Walk`.
            report: is given a sentence for each layer.
        """
        checkpoint = checkpoint or self.checkpoint
        layers = self.config.model.num_layers
        entered = partial(_entered, report, checkpoint.path.name, layers)
        return Walk(self.lm, checkpoint.model, self.backend, portions, without_first_choice, entered)

    def open_earlier(self, path: Path) -> Checkpoint:
        """An earlier checkpoint. Raises CheckpointError if it does not fit the model."""
        checkpoint = finite(open_checkpoint(path))
        check_parameters(checkpoint, self.lm.parameter_specs())
        return checkpoint


def open_run(run_dir: Path, options: Options) -> Opened:
    """Open a run.

    Raises: UserError, ConfigError or CheckpointError if it cannot be inspected.
    """
    text = opened_text(run_dir, options.checkpoint, "be inspected on tokens")
    config, checkpoint = text.config, text.checkpoint
    paths = list_checkpoints(run_dir / CHECKPOINT_DIR)
    before = paths[: [path.name for path in paths].index(checkpoint.path.name)]
    backend = BackendConfig.model_validate({"name": options.backend}) if options.backend else config.backend
    return Opened(
        run_dir,
        _with_context(with_capacity(config, options), options.context),
        text.tokenizer,
        checkpoint,
        _evenly(before, options.checkpoints - 1),
        get_backend(backend.on_any_device().model_copy(update={"compile": None})),
    )


def with_capacity(config: Config, options: Options) -> Config:
    """The config with the capacity that the options ask for, held against all rules.

    Raises: UserError or ConfigError for a capacity that the run cannot have.
    """
    update: dict[str, Any] = {}
    if options.factor is not None:
        update |= {"policy": "factor", "factor": options.factor}
    if options.drop is not None:
        if options.factor is None and not config.model.moe.capacity.has_limit:
            raise UserError(
                f"--drop {options.drop}: the run has no capacity (model.moe.capacity.policy: "
                f"{config.model.moe.capacity.policy}), so nothing is dropped; expected --factor too"
            )
        update["drop"] = options.drop
    if not update:
        return config
    values = config.model_dump(mode="json", exclude_unset=True)
    moe = values.setdefault("model", {}).setdefault("moe", {})
    kept = moe.get("capacity", {}) if options.factor is None else {}
    return config_from_dict(values | {"model": {**values["model"], "moe": moe | {"capacity": kept | update}}})


def _with_context(config: Config, context: int | None) -> Config:
    if context is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": context})})


def _evenly(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the paths, evenly spaced, with the first."""
    if count <= 0 or not paths:
        return []
    count = min(count, len(paths))
    return [paths[index * len(paths) // count] for index in range(count)]


def _entered(report: Callable[[str], None], name: str, layers: int, layer: int) -> None:
    report(f"{name}: layer {layer + 1} of {layers}")
