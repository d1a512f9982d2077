"""What moeport writes beside the tensors of a DCP folder: their names and checksums, and the checkpoint's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, get_args

from moeport.convert.dcp_names import Names
from moeport.convert.record import read_record_file
from moeport.errors import DataError
from moeport.files import write_json
from moeport.training.checkpoint_meta import CheckpointMeta

FILE = "moeport-dcp.json"
FORMAT, FORMAT_VERSION = "moeport-dcp", 1
REMEDY = "if it is not needed, delete it and give --config"


def write_record(folder: Path, names: Names, digests: Mapping[str, str], meta: CheckpointMeta) -> None:
    """Write the file.

    Args:
        folder: holds the tensors.
        names: whose names they have.
        digests: SHA-256 by name.
        meta: of the checkpoint.
    """
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, "names": names, "sha256": digests}
    write_json(folder / FILE, {**values, "meta": asdict(meta)})


def read_record(source: Path) -> dict[str, Any] | None:
    """What moeport wrote beside the tensors; None if there is nothing. Raises DataError if it is damaged."""
    file = source / FILE
    if not file.is_file():
        return None
    form = {"names": str, "sha256": {...: str}, "meta": dict}
    values = read_record_file(file, FORMAT, FORMAT_VERSION, form, REMEDY)
    known, given = fields(CheckpointMeta), values["meta"].keys()
    wanted = {field.name for field in known if field.default is MISSING}
    if values["names"] not in get_args(Names) or not wanted <= given <= {field.name for field in known}:
        raise DataError(f"{file}: expected names and metadata as moeport writes them; {REMEDY}")
    return values
