"""Checkpoints: safetensors and JSON, complete or absent.

`RUN_DIR/checkpoints/step-000100/` holds for each rank that wrote it, of R ranks,

    model-00000-of-0000R.safetensors       parts of the parameters, and of the routers' state
    optimizer-00000-of-0000R.safetensors   parts of the optimiser's state
    index-00000-of-0000R.json              which parts these are, with a checksum of every block

and `meta.json`, which records the step, the config, and the size of all other files with checksums. A checkpoint is
written under a temporary name, flushed to disk and renamed, so a folder named `step-*` is always complete, whenever a
process dies. It is read a part at a time, by any number of ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from moeport.core.weights import Box, Shard, Weights
from moeport.errors import CheckpointError, DataError
from moeport.files import atomic_folder, remove, remove_leftovers
from moeport.reading import read_bytes
from moeport.training.checkpoint_index import KINDS, Arrays, read_arrays
from moeport.training.checkpoint_meta import (
    META_FILE,
    UNDIVIDED,
    CheckpointMeta,
    checkpoint_name,
    file_digest,
    file_entry,
    index_files,
    is_listed_whole,
    read_meta_file,
)
from moeport.training.checkpoint_reading import StoredWeights, undivided
from moeport.training.checkpoint_writing import NewPart, complete, part_of, whole_part, write_rank
from moeport.training.tensor_file import ITEM_BYTES, NewTensor

_NAME = re.compile(r"step-(\d{6,})")
FILE_BYTES = 5 * 10**9
"""Most bytes of a file that one process writes, unless one array has more."""
_MAX_INDEX = 2**30
"""Bytes; an index has some ten for every million entries."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, whose arrays are read when they are asked for."""

    path: Path
    meta: CheckpointMeta
    model: Weights
    """Parameters by name."""
    optimizer: Weights
    """Optimiser state by name."""


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in `directory`, oldest step first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def save_checkpoint(
    directory: Path, meta: CheckpointMeta, model: Mapping[str, np.ndarray], optimizer: Mapping[str, np.ndarray]
) -> Path:
    """Write a checkpoint; it appears under its name only once it is complete and on disk.

    Raises WriteError if it cannot be written.
    """

    def parts(arrays: Mapping[str, np.ndarray]) -> list[NewPart]:
        return [part_of(Shard(name, x.shape, Box.whole(x.shape), x)) for name, x in arrays.items()]

    return _save(directory, meta, parts(model), parts(optimizer))


def save_streamed(
    directory: Path,
    meta: CheckpointMeta,
    model: Sequence[NewTensor],
    before: Callable[[], None] = lambda: None,
    optimizer: Sequence[NewTensor] = (),
) -> Path:
    """Write a checkpoint as `save_checkpoint` does, a block of an array at a time.

    `before` is called once all arrays are written, and before there is a checkpoint; if it raises an error, there is
    none.
    """
    return _save(directory, meta, [whole_part(new) for new in model], [whole_part(new) for new in optimizer], before)


def _save(
    directory: Path,
    meta: CheckpointMeta,
    model: Sequence[NewPart],
    optimizer: Sequence[NewPart],
    before: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint from one process, as several ranks would if it is large."""
    final = directory / checkpoint_name(meta.step)
    files = list(zip_longest(_files(model), _files(optimizer), fillvalue=()))
    with atomic_folder(final) as folder:
        for rank, parts in enumerate(files):
            write_rank(folder, rank, len(files), *parts)
        complete(folder, meta, len(files), 0.0)
        before()
    return final


def _files(parts: Sequence[NewPart]) -> list[list[NewPart]]:
    """The parts that share a file: of FILE_BYTES together, unless one has more."""
    files: list[list[NewPart]] = [[]]
    size = 0
    for part in parts:
        size += ITEM_BYTES[part.code] * part.box.size
        if files[-1] and size > FILE_BYTES:
            files.append([])
            size = ITEM_BYTES[part.code] * part.box.size
        files[-1].append(part)
    return files


def prune_checkpoints(directory: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all but the newest `keep_last` and, with `keep_best`, the one with the lowest validation loss.

    What killed processes left half-written is deleted too, but nothing that another process is writing.
    """
    paths = list_checkpoints(directory)
    keep = set(paths[-keep_last:])
    if keep_best and (best := best_checkpoint(directory)):
        keep.add(best)
    for path in paths:
        if path not in keep:
            remove(path)
    remove_leftovers(directory)


def best_checkpoint(directory: Path) -> Path | None:
    """The evaluated checkpoint with the lowest validation loss; None if there is none.

    One whose meta.json cannot be read is passed over.
    """
    losses = {}
    for path in list_checkpoints(directory):
        try:
            loss = read_meta(path).val_loss
        except CheckpointError:
            continue
        if loss is not None:
            losses[path] = loss
    return min(losses, key=losses.__getitem__) if losses else None


def find_checkpoint(directory: Path, which: str) -> Path:
    """The checkpoint that `which` names: latest, best or step-N.

    Raises CheckpointError, which lists the available names.
    """
    paths = list_checkpoints(directory)
    if not paths:
        raise CheckpointError(f"{directory}: there is no checkpoint; train first, or give a folder that holds step-*")
    if which == "latest":
        return paths[-1]
    if which == "best":
        best = best_checkpoint(directory)
        if best is None:
            raise CheckpointError(f"{directory}: no checkpoint was evaluated; use latest or step-N")
        return best
    wanted = re.fullmatch(r"step-(\d+)", which)
    for path in paths:
        if wanted and int(path.name.removeprefix("step-")) == int(wanted[1]):
            return path
    names = ", ".join(path.name for path in paths)
    raise CheckpointError(f"{directory}: there is no checkpoint {which}; expected latest, best or one of {names}")


def open_checkpoint(path: Path) -> Checkpoint:
    """The metadata of a checkpoint, and its arrays, to be read a part at a time.

    What can be told from the sizes of its files and its indexes is checked now, and every block when it is read. Files
    of format versions 1 and 2, which have no checksums of blocks, are read once for theirs.

    Raises CheckpointError if it is incomplete, altered or not written by moeport, now or when a block is read.
    """
    meta, files = read_meta_file(path)
    with _reading(path):
        _check_sizes(path, files)
        indexes = index_files(files)
        for name, expected in files.items():
            if not is_listed_whole(name, expected):
                _check_digest(path / name, file_entry, expected)
        arrays = _indexed(path, indexes) if indexes else {kind: undivided(path / UNDIVIDED[kind]) for kind in KINDS}
    return Checkpoint(path, meta, *(StoredWeights(arrays[kind]) for kind in KINDS))


def verify_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that was read from end to end, and is what was written.

    Raises CheckpointError, which names the array and the expert, or else the file, that is damaged.
    """
    checkpoint = open_checkpoint(path)
    for arrays in (checkpoint.model, checkpoint.optimizer):
        assert isinstance(arrays, StoredWeights)
        for name in arrays:
            for _ in arrays.blocks(name):
                pass
    _, files = read_meta_file(path)
    with _reading(path):
        for name, expected in files.items():
            if is_listed_whole(name, expected):
                _check_digest(path / name, file_digest, expected)
    return checkpoint


def _indexed(path: Path, names: Sequence[str]) -> dict[str, Arrays]:
    indexes = {}
    for name in names:
        try:
            indexes[name] = json.loads(read_bytes(path / name, _MAX_INDEX))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path / name}: not valid JSON ({error}); use another checkpoint") from error
    return read_arrays(path, indexes)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; use another checkpoint") from error


def _check_sizes(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Refuse files that are missing, of another size than meta.json lists, or not listed."""
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; the checkpoint is incomplete, use another one")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{file}: truncated or altered: expected {expected['bytes']} bytes, "
                f"found {size}; use another checkpoint"
            )
    listed = {META_FILE, *files}
    others = sorted(file.name for file in path.iterdir() if file.name not in listed and file.name[0] != ".")
    if others:
        raise CheckpointError(
            f"{path / others[0]}: does not belong to the checkpoint, whose files {META_FILE} lists; "
            "move it to another folder"
        )


def _check_digest(file: Path, entry_of: Callable[[Path], dict[str, Any]], expected: dict[str, Any]) -> None:
    try:
        found = entry_of(file)
    except DataError as error:
        raise CheckpointError(f"{error}; use another checkpoint") from error
    if found != expected:
        raise CheckpointError(f"{file}: contents do not match their checksum; use another checkpoint")


def read_meta(path: Path) -> CheckpointMeta:
    """The metadata of a checkpoint, without reading its arrays."""
    return read_meta_file(path)[0]
