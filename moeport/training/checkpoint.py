"""Checkpoints: safetensors and JSON, complete or absent.

`RUN_DIR/checkpoints/step-000100/` holds `model.safetensors`, `optimizer.safetensors` and `meta.json`, which records
the step, the config, and the size and SHA-256 of the other two. A checkpoint is written under a temporary name, flushed
to disk and renamed, so a folder named `step-*` is always complete, whenever the process dies.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moeport.core.parameters import ParameterSpec
from moeport.errors import CheckpointError

FORMAT = "moeport-checkpoint"
FORMAT_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, META_FILE = "model.safetensors", "optimizer.safetensors", "meta.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class CheckpointMeta:
    """Metadata of a checkpoint."""

    step: int
    """Number of optimiser steps done."""
    tokens: int
    """Number of tokens trained on."""
    val_loss: float | None
    """Validation loss at this step in nats per token or per image; None if it was not evaluated here."""
    tokenizer: str | None
    """Fingerprint of the tokenizer; None for images."""
    data: str
    """Fingerprint of the training tokens or images."""
    config: dict[str, Any]
    """The resolved config."""
    version: str
    """The moeport version that wrote it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk."""

    path: Path
    meta: CheckpointMeta
    model: dict[str, np.ndarray]
    """Parameters by name."""
    optimizer: dict[str, np.ndarray]
    """Optimiser state by name."""


def checkpoint_name(step: int) -> str:
    """`step-000100` for step 100."""
    return f"step-{step:06d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in `directory`, oldest step first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    directory: Path, meta: CheckpointMeta, model: Mapping[str, np.ndarray], optimizer: Mapping[str, np.ndarray]
) -> Path:
    """Write a checkpoint; it appears under its name only once it is complete and on disk."""
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / checkpoint_name(meta.step)
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(dict(model), temporary / MODEL_FILE)
    save_file(dict(optimizer), temporary / OPTIMIZER_FILE)
    files = {name: file_digest(temporary / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(meta), "files": files}, indent=2)
    (temporary / META_FILE).write_text(text)
    for name in (MODEL_FILE, OPTIMIZER_FILE, META_FILE):
        _sync(temporary / name)
    _sync(temporary)
    if final.exists():
        _remove(final)
    temporary.rename(final)
    _sync(directory)
    return final


def prune_checkpoints(directory: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all but the newest `keep_last` and, with `keep_best`, the one with the lowest validation loss."""
    paths = list_checkpoints(directory)
    keep = set(paths[-keep_last:])
    if keep_best and (best := best_checkpoint(directory)):
        keep.add(best)
    for path in paths:
        if path not in keep:
            _remove(path)
    for leftover in directory.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def best_checkpoint(directory: Path) -> Path | None:
    """The evaluated checkpoint with the lowest validation loss; None if none was evaluated."""
    losses = {path: read_meta(path).val_loss for path in list_checkpoints(directory)}
    evaluated = {path: loss for path, loss in losses.items() if loss is not None}
    return min(evaluated, key=evaluated.__getitem__) if evaluated else None


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
    meta, files = _read_meta(path)
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
    try:
        return Checkpoint(path, meta, load_file(path / MODEL_FILE), load_file(path / OPTIMIZER_FILE))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}; use another checkpoint") from error


def check_parameters(checkpoint: Checkpoint, specs: list[ParameterSpec]) -> None:
    """Refuse a checkpoint whose parameters are not exactly those of the model."""
    expected = {spec.name: spec.shape for spec in specs}
    found = {name: value.shape for name, value in checkpoint.model.items()}
    faults = [f"{name}: missing" for name in expected.keys() - found.keys()]
    faults += [f"{name}: not in this model" for name in found.keys() - expected.keys()]
    faults += [
        f"{name}: shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise CheckpointError(f"{checkpoint.path}: does not fit the model of the config: {shown}")


def read_meta(path: Path) -> CheckpointMeta:
    """The metadata of a checkpoint, without reading its arrays."""
    return _read_meta(path)[0]


def _read_meta(path: Path) -> tuple[CheckpointMeta, dict[str, dict[str, Any]]]:
    file = path / META_FILE
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not a moeport checkpoint: it has no {META_FILE}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); use another checkpoint") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f'{file}: not written by moeport: expected "format": "{FORMAT}"')
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format version {version}, but this moeport reads version {FORMAT_VERSION}; "
            "use a moeport version that reads it"
        )
    wanted = [*CheckpointMeta.__dataclass_fields__, "files"]
    missing = [key for key in wanted if key not in data]
    if missing:
        raise CheckpointError(f"{file}: incomplete: missing {', '.join(missing)}; use another checkpoint")
    return CheckpointMeta(**{key: data[key] for key in CheckpointMeta.__dataclass_fields__}), data["files"]


def file_digest(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as checkpoints and bundles list them."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a half-deleted one is never seen."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(doomed)
    shutil.rmtree(doomed)
