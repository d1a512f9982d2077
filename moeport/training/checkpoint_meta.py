"""meta.json of a checkpoint: what it says, and whether it can be trusted.

Since format version 3 each rank has files of its own, with the parts of the arrays that it holds, and an index of them.
Versions 1 and 2, which are still read, have two files, with all arrays whole. Since version 2 meta.json holds a digest
of itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeport.errors import CheckpointError
from moeport.reading import read_json
from moeport.training.tensor_file import read_head

FORMAT = "moeport-checkpoint"
FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, FORMAT_VERSION)
META_FILE = "meta.json"
UNDIVIDED = {"model": "model.safetensors", "optimizer": "optimizer.safetensors"}
"""The files of versions 1 and 2."""
HEAD_DIGEST = "head_sha256"
"""Of a file with the parts of a rank, whose index has checksums of the parts: the SHA-256 of what comes before them."""
_INDEX = re.compile(r"index-\d{5,}-of-\d{5,}\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CheckpointMeta:
    """Metadata of a checkpoint."""

    step: int
    """Number of steps done, including those that were skipped."""
    tokens: int
    """Number of tokens trained on."""
    val_loss: float | None
    """Validation loss at this step in nats per token or per image; None if it was not evaluated here or not finite."""
    tokenizer: str | None
    """Fingerprint of the tokenizer; None for images."""
    data: str
    """Fingerprint of the training tokens or images."""
    config: dict[str, Any]
    """The resolved config."""
    version: str
    """The moeport version that wrote it."""
    domains: dict[str, int] | None = None
    """Sequences of each step by domain; None without domains, and in checkpoints of versions that had none."""
    origin: dict[str, Any] | None = None
    """The checkpoint whose weights the run started from, as `moeport.training.start_from.origin` describes it; None for
    initial weights, and in checkpoints of versions that did not say.
    """


def checkpoint_name(step: int) -> str:
    """`step-000100` for step 100."""
    return f"step-{step:06d}"


def array_file(kind: str, rank: int, ranks: int) -> str:
    """The file of a rank with parts of the parameters (`model`) or of the optimiser's state (`optimizer`)."""
    return f"{kind}-{rank:05d}-of-{ranks:05d}.safetensors"


def index_file(rank: int, ranks: int) -> str:
    """The index of the files of a rank."""
    return f"index-{rank:05d}-of-{ranks:05d}.json"


def index_files(files: Iterable[str]) -> list[str]:
    """The indexes among the files of a checkpoint; none if it is of version 1 or 2."""
    return sorted(name for name in files if _INDEX.fullmatch(name))


def file_digest(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as checkpoints and bundles list them."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def file_entry(file: Path) -> dict[str, Any]:
    """What meta.json lists of a file of a checkpoint: its size, and the SHA-256 of it, or of its head.

    Raises:
        DataError: the file has no such head.
        OSError: it cannot be read.
    """
    if _key(file.name) == HEAD_DIGEST:
        return {"bytes": file.stat().st_size, HEAD_DIGEST: hashlib.sha256(read_head(file)).hexdigest()}
    return file_digest(file)


def meta_text(meta: CheckpointMeta, files: dict[str, dict[str, Any]]) -> str:
    """The contents of meta.json, given the size and a SHA-256 of each other file."""
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(meta), "files": files}
    values["val_loss"] = _finite(meta.val_loss)
    return json.dumps({**values, "digest": _digest(values)}, indent=2) + "\n"


def read_meta_file(path: Path) -> tuple[CheckpointMeta, dict[str, dict[str, Any]]]:
    """The metadata of the checkpoint `path`, and the size and a SHA-256 of each other file.

    Raises CheckpointError for a meta.json that is missing, damaged, of another version or of another checkpoint.
    """
    file = path / META_FILE
    data = _json(path, file)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f'{file}: not written by moeport: expected "format": "{FORMAT}"')
    version = data.get("format_version")
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{file}: format version {version}, but this moeport reads versions "
            f"{READABLE_VERSIONS[0]} to {FORMAT_VERSION}; use a moeport version that reads it"
        )
    missing = [key for key in (*_WANTED, *(["digest"] if version > 1 else [])) if key not in data]
    if missing:
        raise CheckpointError(f"{file}: incomplete: missing {', '.join(missing)}; use another checkpoint")
    if version > 1 and data.pop("digest") != _digest(data):
        raise CheckpointError(f"{file}: contents do not match their checksum; use another checkpoint")
    for key, (is_valid, expected) in (_WANTED | _OPTIONAL).items():
        if key in data and not is_valid(data[key]):
            raise CheckpointError(
                f"{file}: {key} is {json.dumps(data[key])[:60]}, expected {expected}; use another checkpoint"
            )
    _check_step(path, data["step"])
    values = {key: data[key] for key in CheckpointMeta.__dataclass_fields__ if key in data}
    return CheckpointMeta(**{**values, "val_loss": _finite(data["val_loss"])}), data["files"]


def _json(path: Path, file: Path) -> Any:
    try:
        if not file.is_file():  # a pipe, for instance, would never end
            raise CheckpointError(f"{path}: not a moeport checkpoint: it has no {META_FILE}")
        return read_json(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; use another checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); use another checkpoint") from error


def _check_step(path: Path, step: int) -> None:
    """Refuse a folder that is named after another step than that of its contents."""
    if re.fullmatch(r"step-\d+", path.name) and path.name != checkpoint_name(step):
        raise CheckpointError(
            f"{path}: holds the checkpoint of step {step}, which belongs in a folder {checkpoint_name(step)}; "
            "rename it, or use another checkpoint"
        )


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of JSON values, however they are laid out in the file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number_or_none(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _are_counts_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_count, value.values())))


def _is_list_of_files(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _are_names(value)
        and all(isinstance(entry, dict) and _is_described(name, entry) for name, entry in value.items())
    )


def is_listed_whole(name: str, entry: dict[str, Any]) -> bool:
    """Whether the parts of a rank are listed with the SHA-256 of their whole file, as version 3 did at first."""
    return _key(name) == HEAD_DIGEST and "sha256" in entry


def _is_described(name: str, entry: dict[str, Any]) -> bool:
    key = "sha256" if is_listed_whole(name, entry) else _key(name)
    return (
        sorted(entry) == sorted(["bytes", key])
        and _is_count(entry["bytes"])
        and isinstance(entry[key], str)
        and bool(_SHA256.fullmatch(entry[key]))
    )


def _key(name: str) -> str:
    """Under which meta.json lists the SHA-256 of a file."""
    return "sha256" if name in UNDIVIDED.values() or _INDEX.fullmatch(name) else HEAD_DIGEST


def _are_names(names: Collection[str]) -> bool:
    """Whether they are the files of versions 1 and 2, or those of all ranks."""
    if not (indexes := index_files(names)):
        return sorted(names) == sorted(UNDIVIDED.values())
    ranks = len(indexes)
    wanted = [array_file(kind, rank, ranks) for kind in UNDIVIDED for rank in range(ranks)]
    return sorted(names) == sorted([*wanted, *(index_file(rank, ranks) for rank in range(ranks))])


_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "an integer of at least 0"),
    "tokens": (_is_count, "an integer of at least 0"),
    "val_loss": (_is_number_or_none, "a number or null"),
    "tokenizer": (lambda value: value is None or isinstance(value, str), "a string or null"),
    "data": (lambda value: isinstance(value, str), "a string"),
    "config": (lambda value: isinstance(value, dict), "an object"),
    "version": (lambda value: isinstance(value, str), "a string"),
    "files": (_is_list_of_files, "size and SHA-256 of the model, optimizer and index files of every rank, and no more"),
}
"""For each key of meta.json, whether a value is valid, and what is."""
_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "domains": (_are_counts_or_none, "an object of integers"),
    "origin": (lambda value: value is None or isinstance(value, dict), "an object or null"),
}
"""The same for keys that older versions do not write."""
