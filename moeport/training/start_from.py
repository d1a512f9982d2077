"""The weights that a new run starts from, if not from random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeport.config.schema import Config
from moeport.core.parameters import ParameterSpec
from moeport.errors import CheckpointError, UserError
from moeport.training.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from moeport.training.checkpoint_meta import META_FILE
from moeport.training.fits import check_parameters, finite
from moeport.training.resumable import Effect, changes, rule_of
from moeport.training.run_dir import CHECKPOINT_DIR, CONFIG_FILE

KEY = "training.start_from"


def start_folders(path: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `training.start_from` names: a run's newest one, or itself.

    Raises UserError if there is none.
    """
    if (path / META_FILE).is_file():
        return path.resolve().parent.parent, path
    if not (path / CHECKPOINT_DIR).is_dir():
        raise UserError(
            f"{KEY}: {path} is neither a run folder nor a checkpoint; expected one, as moeport convert makes it"
        )
    return path, find_checkpoint(path / CHECKPOINT_DIR, "latest")


def starting_checkpoint(path: Path, specs: list[ParameterSpec], tokenizer: str | None) -> Checkpoint:
    """The checkpoint whose weights a run starts from; they are read when they are asked for.

    Args:
        path: the value of `training.start_from`.
        specs: the parameters of the model.
        tokenizer: fingerprint of the new run's tokenizer; None for images.

    Raises UserError, also later when they are read, if they are damaged, of another model, or of another tokenizer,
    whose ids mean something else.
    """
    run_dir, folder = start_folders(path)
    checkpoint = finite(open_checkpoint(folder))
    check_parameters(checkpoint, specs)
    if checkpoint.meta.tokenizer not in (None, tokenizer):
        raise CheckpointError(
            f"{KEY}: {folder} has another tokenizer than data.tokenizer gives, so its embedding would not fit; "
            f"expected data.tokenizer as in {run_dir / CONFIG_FILE}, or for other texts {{name: file, path: {run_dir}}}"
        )
    return checkpoint


def origin(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """What is recorded of the checkpoint whose weights a run starts from.

    Returns: `checkpoint`, its path; `step`; and `changed`, the keys of the model and the data with other values than
    there, each with both.
    """
    changed = {
        change.key: [change.before, change.now] for change in changes(config, checkpoint) if _matters(change.key)
    }
    return {"checkpoint": str(checkpoint.path), "step": checkpoint.meta.step, "changed": changed}


def _matters(key: str) -> bool:
    return key.startswith(("model.", "data.")) and rule_of(key).effect is not Effect.NONE
