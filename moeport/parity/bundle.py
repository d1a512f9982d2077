"""Bundles: recordings on disk, to compare machines that are not connected.

A folder with `manifest.json` and `tensors.safetensors`. The manifest holds the format, a description of each tensor and
of how it was reduced, the environment, the config, the trajectory, and the size and SHA-256 of the other file. Nothing
in it depends on time or paths: two recordings of the same run have the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moeport.errors import UserError
from moeport.files import atomic_folder
from moeport.parity.recording import Recording, Statistics, Step, TensorRecord
from moeport.reading import NUMBER, check_types, read_json
from moeport.training.checkpoint_meta import file_digest

FORMAT = "moeport-parity-bundle"
FORMAT_VERSION = 2
"""Version 2 has the kinds `moment`, `state` and `second step`."""
READABLE = (1, FORMAT_VERSION)
_NUMBERS = dict.fromkeys(("loss", "total_loss", "grad_norm", "load_balance", "router_z", "lr"), NUMBER)
_FORM = {
    "name": str,
    "dtype": str,
    "replayed": (str, type(None)),
    "sample_size": int,
    "notes": [str],
    "environment": dict,
    "config": dict,
    "trajectory": [{"step": int, **_NUMBERS, "expert_load": [[NUMBER]]}],
    "tensors": [
        {
            "name": str,
            "kind": str,
            "dtype": str,
            "shape": [int],
            "layer": (int, type(None)),
            "op": (str, type(None)),
            "inputs": [str],
            "keep": str,
            "statistics": (dict, type(None)),
        }
    ],
    "files": {"tensors.safetensors": {"bytes": int, "sha256": str}},
}
"""What the values of a manifest are; see `check_types`."""
MANIFEST_FILE, TENSORS_FILE = "manifest.json", "tensors.safetensors"


class BundleError(UserError):
    """A bundle that is missing, damaged or not written by moeport."""


def refuse_existing(folder: Path, overwrite: bool, option: str = "--overwrite") -> None:
    """Raises BundleError for a folder that holds anything; with `overwrite`, anything other than a bundle.

    Args:
        folder: folder of a new bundle.
        overwrite: whether an older bundle may be replaced.
        option: how the user says so.
    """
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if present - {MANIFEST_FILE, TENSORS_FILE}:
        raise BundleError(f"{folder}: holds other files; expected a new folder or an older bundle")
    if present and not overwrite:
        raise BundleError(f"{folder}: already holds a bundle; name another folder, or replace it with {option}")


def save_bundle(recording: Recording, folder: Path, *, overwrite: bool = False, option: str = "overwrite=True") -> None:
    """Write a recording; refuses a folder that holds anything. Arguments as in `refuse_existing`."""
    refuse_existing(folder, overwrite, option)
    with atomic_folder(folder) as temporary:
        _write(recording, temporary)


def _write(recording: Recording, folder: Path) -> None:
    records = recording.tensors.values()
    arrays = {t.name: _packed(t.values, t.dtype) for t in records if t.values is not None}
    save_file(arrays, folder / TENSORS_FILE)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": recording.name,
        "dtype": recording.dtype,
        "replayed": recording.replayed,
        "sample_size": recording.sample_size,
        "notes": recording.notes,
        "non_finite": recording.non_finite,
        "environment": recording.environment,
        "config": recording.config,
        "trajectory": [asdict(step) for step in recording.trajectory],
        "tensors": [_described(t) for t in records],
        "files": {TENSORS_FILE: file_digest(folder / TENSORS_FILE)},
    }
    text = json.dumps(manifest, indent=1)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"sha256": _hash(text)}, indent=1), encoding="utf-8")


def load_bundle(folder: Path) -> Recording:
    """Read and verify a bundle.

    Raises BundleError if it is truncated, altered or not written by moeport.
    """
    manifest = _manifest(folder)
    file, expected = folder / TENSORS_FILE, manifest["files"][TENSORS_FILE]
    if not file.is_file():
        raise BundleError(f"{file}: missing; the bundle is incomplete, record it again")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise BundleError(
            f"{file}: truncated or altered: expected {expected['bytes']} bytes, found {size}; copy or record it again"
        )
    if file_digest(file) != expected:
        raise BundleError(f"{file}: contents do not match their checksum; copy or record the bundle again")
    try:
        arrays = load_file(file)
    except SafetensorError as error:
        raise BundleError(f"{file}: not a safetensors file: {error}; record the bundle again") from error
    try:
        return _recording(manifest, arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{folder}: not as moeport writes it ({error}); copy or record the bundle again") from error


def _recording(manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> Recording:
    """The recording that a manifest and its arrays describe."""
    tensors = {}
    for entry in manifest["tensors"]:
        statistics = Statistics(**entry.pop("statistics")) if entry["statistics"] else None
        entry |= {"shape": tuple(entry["shape"]), "inputs": tuple(entry["inputs"]), "statistics": statistics}
        values = arrays.get(entry["name"])
        values = None if values is None else _unpacked(values, entry["dtype"])
        if values is not None and entry["keep"] == "full":
            values = values.reshape(entry["shape"])
        tensors[entry["name"]] = TensorRecord(**entry, values=values)
    return Recording(
        name=manifest["name"],
        dtype=manifest["dtype"],
        tensors=tensors,
        trajectory=[Step(**step) for step in manifest["trajectory"]],
        config=manifest["config"],
        environment=manifest["environment"],
        replayed=manifest["replayed"],
        sample_size=manifest["sample_size"],
        notes=manifest["notes"],
        non_finite=manifest.get("non_finite"),
    )


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST_FILE
    try:
        manifest = read_json(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.exists():
            raise BundleError(
                f"{folder}: no such folder; expected a bundle that moeport parity record has written"
            ) from error
        raise BundleError(f"{folder}: not a parity bundle: it has no {MANIFEST_FILE}") from error
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror}; copy or record the bundle again") from error
    except ValueError as error:
        raise BundleError(f"{file}: not valid JSON ({error}); copy or record the bundle again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f'{file}: not written by moeport: expected "format": "{FORMAT}"')
    version = manifest.get("format_version")
    if version not in READABLE:
        raise BundleError(
            f"{file}: format version {version}, but this moeport reads versions {' and '.join(map(str, READABLE))}; "
            "use a moeport version that reads it"
        )
    digest = manifest.pop("sha256", None)
    if digest != _hash(json.dumps(manifest, indent=1)):
        raise BundleError(f"{file}: contents do not match their checksum; copy or record the bundle again")
    try:
        check_types(manifest, _FORM)
    except ValueError as error:
        raise BundleError(f"{file}: {error}; copy or record the bundle again") from error
    return manifest


def _described(record: TensorRecord) -> dict[str, Any]:
    """A record without its entries."""
    statistics = asdict(record.statistics) if record.statistics else None
    return {
        "name": record.name,
        "kind": record.kind,
        "dtype": record.dtype,
        "shape": list(record.shape),
        "layer": record.layer,
        "op": record.op,
        "inputs": list(record.inputs),
        "keep": record.keep,
        "statistics": statistics,
    }


def _packed(values: np.ndarray, dtype: str) -> np.ndarray:
    """Entries as they are stored: bfloat16 arrives as float32, of which it is the upper half."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values)


def _unpacked(values: np.ndarray, dtype: str) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else values


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
