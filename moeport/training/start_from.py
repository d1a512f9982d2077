"""The weights that a new run starts from, if not from random ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moeport.core.parameters import ParameterSpec
from moeport.errors import CheckpointError, UserError
from moeport.training.checkpoint import find_checkpoint, open_checkpoint
from moeport.training.checkpoint_meta import META_FILE
from moeport.training.fits import check_parameters, finite
from moeport.training.run_dir import CHECKPOINT_DIR

KEY = "training.start_from"


def start_folders(path: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `training.start_from` names: a run's newest one, or itself.

    Raises UserError if there is none.
    """
    if (path / META_FILE).is_file():
        return path.resolve().parent.parent, path
    if not (path / CHECKPOINT_DIR).is_dir():
        raise UserError(f"{KEY}: {path} is no run folder and no checkpoint; expected one, as moeport convert makes it")
    return path, find_checkpoint(path / CHECKPOINT_DIR, "latest")


def starting_weights(path: Path, specs: list[ParameterSpec], tokenizer: str | None) -> Mapping[str, np.ndarray]:
    """The parameters of a run or of a checkpoint by name, read when they are asked for.

    Args:
        path: the value of `training.start_from`.
        specs: the parameters of the model.
        tokenizer: fingerprint of the new run's tokenizer; None for images.

    Raises UserError, also later when they are read, if they are damaged, of another model, or of another tokenizer,
    whose ids mean something else.
    """
    _, folder = start_folders(path)
    checkpoint = finite(open_checkpoint(folder))
    check_parameters(checkpoint, specs)
    if checkpoint.meta.tokenizer not in (None, tokenizer):
        raise CheckpointError(
            f"{KEY}: {folder} has another tokenizer than data.tokenizer gives, so its embedding would not fit; "
            f"expected data.tokenizer as in {folder.parent.parent / 'config.yaml'}"
        )
    return checkpoint.model
