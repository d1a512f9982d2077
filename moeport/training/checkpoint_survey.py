"""What `moeport checkpoint` says of checkpoints."""

from __future__ import annotations

from pathlib import Path

from moeport.errors import CheckpointError
from moeport.training.checkpoint import list_checkpoints, open_checkpoint, verify_checkpoint
from moeport.training.checkpoint_meta import META_FILE, index_files, read_meta_file
from moeport.training.run_dir import CHECKPOINT_DIR


def checkpoints_in(path: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, or `path` if it is one. Raises CheckpointError for neither."""
    if (path / META_FILE).is_file():
        return [path]
    found = list_checkpoints(path / CHECKPOINT_DIR)
    if not found:
        raise CheckpointError(f"{path}: is neither a checkpoint nor a run folder with checkpoints in {CHECKPOINT_DIR}/")
    return found


def row_of(path: Path) -> str:
    """A line that describes a checkpoint, or says what is wrong with it."""
    try:
        meta, files = read_meta_file(path)
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return f"{path.name}  damaged: {error}"
    loss = "not evaluated" if meta.val_loss is None else f"val_loss {meta.val_loss:.4f}"
    arrays, size = len(checkpoint.model) + len(checkpoint.optimizer), sum(entry["bytes"] for entry in files.values())
    ranks = max(1, len(index_files(files)))
    return (
        f"{path.name}  {meta.tokens:,} tokens, {loss}, {arrays:,} array{'s'[: arrays != 1]}, {size:,} bytes, "
        f"of {ranks} rank{'s'[: ranks > 1]}"
    )


def damage(path: Path) -> CheckpointError | None:
    """What is wrong with a checkpoint that was read from end to end; None if nothing is."""
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        return error
    return None
