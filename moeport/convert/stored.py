"""The parameters of a checkpoint as tensors in a file."""

from __future__ import annotations

from pathlib import Path

from moeport.errors import CheckpointError
from moeport.training.checkpoint import verify_checkpoint
from moeport.training.checkpoint_meta import CheckpointMeta, read_meta_file
from moeport.training.tensor_file import StoredTensor, read_header


def open_stored(path: Path) -> tuple[CheckpointMeta, dict[str, StoredTensor]]:
    """The metadata of a checkpoint, and its parameters by name, to be read a block at a time. It is verified first.

    Raises CheckpointError if it is damaged, or if several ranks have written it.
    """
    checkpoint = verify_checkpoint(path)
    files = [name for name in read_meta_file(path)[1] if name.startswith("model")]
    if len(files) > 1:
        raise CheckpointError(f"{path}: was written by {len(files)} ranks; expected one of a run on one rank")
    return checkpoint.meta, read_header(path / files[0])
