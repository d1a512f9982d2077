"""Checkpoints: safetensors and JSON, complete or absent.

`RUN_DIR/checkpoints/step-000100/` holds `model.safetensors`, `optimizer.safetensors` and `meta.json`, which records
the step, the config, and the size and SHA-256 of the other two. A checkpoint is written under a temporary name, flushed
to disk and renamed, so a folder named `step-*` is always complete, whenever the process dies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moeport.errors import CheckpointError
from moeport.files import atomic_folder, remove, remove_leftovers
from moeport.training.checkpoint_meta import (
    ARRAY_FILES,
    META_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    CheckpointMeta,
    checkpoint_name,
    meta_text,
    read_meta_file,
)
from moeport.training.tensor_file import NewTensor, StoredTensor, read_header, write_tensors

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk."""

    path: Path
    meta: CheckpointMeta
    model: dict[str, np.ndarray]
    """Parameters by name."""
    optimizer: dict[str, np.ndarray]
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
    final = directory / checkpoint_name(meta.step)
    with atomic_folder(final) as folder:
        save_file(dict(model), folder / MODEL_FILE)
        save_file(dict(optimizer), folder / OPTIMIZER_FILE)
        files = {name: file_digest(folder / name) for name in ARRAY_FILES}
        (folder / META_FILE).write_text(meta_text(meta, files), encoding="utf-8")
    return final


def save_streamed(
    directory: Path, meta: CheckpointMeta, model: Sequence[NewTensor], before: Callable[[], None] = lambda: None
) -> Path:
    """Write a checkpoint without optimiser state as `save_checkpoint` does, a block of a parameter at a time.

    `before` is called once all parameters are written, and before there is a checkpoint; if it raises an error, there
    is none.
    """
    final = directory / checkpoint_name(meta.step)
    with atomic_folder(final) as folder:
        write_tensors(folder / MODEL_FILE, model)
        save_file({}, folder / OPTIMIZER_FILE)
        files = {name: file_digest(folder / name) for name in ARRAY_FILES}
        (folder / META_FILE).write_text(meta_text(meta, files), encoding="utf-8")
        before()
    return final


def open_checkpoint(path: Path) -> tuple[CheckpointMeta, dict[str, StoredTensor]]:
    """The metadata of a checkpoint, and its parameters by name, to be read a block at a time. It is verified first.

    Raises CheckpointError as `load_checkpoint` does.
    """
    meta, files = read_meta_file(path)
    try:
        _check_files(path, files)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; use another checkpoint") from error
    return meta, read_header(path / MODEL_FILE)


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


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises CheckpointError if it is truncated, altered or not written by moeport.
    """
    meta, files = read_meta_file(path)
    try:
        _check_files(path, files)
        return Checkpoint(path, meta, *(_arrays(path / name) for name in ARRAY_FILES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; use another checkpoint") from error


def _check_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Compare the files of a checkpoint with those that its meta.json lists."""
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
        if file_digest(file) != expected:
            raise CheckpointError(f"{file}: contents do not match their checksum; use another checkpoint")
    listed = {META_FILE, *files}
    others = sorted(file.name for file in path.iterdir() if file.name not in listed and file.name[0] != ".")
    if others:
        raise CheckpointError(
            f"{path / others[0]}: does not belong to the checkpoint, which has {', '.join(sorted(listed))}; "
            "move it to another folder"
        )


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        arrays = load_file(file)
        for array in arrays.values():
            if array.dtype.kind == "V":  # a type that numpy has from an extension, if one happens to be imported
                raise TypeError(f"data type {array.dtype.name!r} not understood")
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:  # the latter: types that numpy lacks
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}; use another checkpoint") from error
    return arrays


def read_meta(path: Path) -> CheckpointMeta:
    """The metadata of a checkpoint, without reading its arrays."""
    return read_meta_file(path)[0]


def file_digest(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as checkpoints and bundles list them."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
