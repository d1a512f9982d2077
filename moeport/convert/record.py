"""What a run remembers of the folder that it was converted from, for the way back: RUN_DIR/huggingface/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from moeport.config import config_from_dict
from moeport.config.schema import Config
from moeport.convert.floats import DTYPES
from moeport.convert.folder import copy_carried
from moeport.convert.parts import Layout
from moeport.errors import DataError, UserError
from moeport.files import atomic_folder, write_json
from moeport.reading import check_types, read_json
from moeport.training.checkpoint import read_meta
from moeport.training.start_from import start_folders

FOLDER, FILE = "huggingface", "moeport.json"
FORMAT, VERSION = "moeport-huggingface", 1
CHECKSUMS_FORMAT = "moeport-checksums"
_MOST_STEPS_BACK = 100
"""Runs of which each started from the next, after which a circle is assumed."""


@dataclass(frozen=True)
class Record:
    """A converted folder."""

    source: str
    """Where it was."""
    family: str
    """Its model_type."""
    layout: Layout
    """How it stored experts."""
    config: dict[str, Any]
    """Its config.json."""
    dtypes: dict[str, str]
    """Element type of each part, by label."""
    extra: list[str]
    """Tensors that say nothing new, such as the second copy of a tied embedding."""
    ignored: list[str]
    """Keys of config.json that the user says have no effect."""
    checksums: dict[str, str]
    """SHA-256 of the bytes of each part, by label."""


def refuse_other(run_dir: Path, source: Path) -> None:
    """Refuse a run folder in which a record would replace files that are not an older record's.

    Args:
        run_dir: the run folder to make.
        source: the folder that is read.
    """
    folder = run_dir / FOLDER
    if folder.exists() and (folder.resolve() == source.resolve() or not (folder / FILE).is_file()):
        raise UserError(f"{folder}: already exists, and not from a conversion; choose another RUN_DIR, or move it")


def write_record(source: Path, run_dir: Path, record: Record) -> list[str]:
    """Write the folder of a run with a record and the files of `source` that are carried along; returns their names."""
    with atomic_folder(run_dir / FOLDER) as folder:
        carried = copy_carried(source, folder)
        write_json(folder / FILE, {"format": FORMAT, "format_version": VERSION, **asdict(record)})
    return carried


def find_record(run_dir: Path, config: Config) -> tuple[Record, Path] | None:
    """The record of a run, or of the run whose weights it started from, and the folder of the carried files.

    Raises DataError if it is damaged.
    """
    for _ in range(_MOST_STEPS_BACK):
        if (run_dir / FOLDER / FILE).is_file():
            return _read(run_dir / FOLDER / FILE), run_dir / FOLDER
        before = config.training.start_from
        if before is None or not before.exists():
            return None
        after, (run_dir, checkpoint) = run_dir, start_folders(before)
        if run_dir.resolve() == after.resolve():
            return None
        config = config_from_dict(read_meta(checkpoint).config, recorded=True)
    return None


def checksums_text(checksums: Mapping[str, str]) -> dict[str, Any]:
    """The contents of a file of checksums."""
    return {"format": CHECKSUMS_FORMAT, "format_version": VERSION, "sha256": dict(checksums)}


def read_checksums(file: Path) -> dict[str, str] | None:
    """The checksums beside weights that moeport wrote; None if there are none.

    Raises DataError if the file is damaged.
    """
    if not file.is_file():
        return None
    values = read_record_file(file, CHECKSUMS_FORMAT, VERSION, {"sha256": {...: str}})
    found: dict[str, str] = values["sha256"]
    return found


def _read(file: Path) -> Record:
    form = {
        "source": str,
        "family": str,
        "layout": str,
        "config": dict,
        "dtypes": {...: str},
        "extra": [str],
        "ignored": [str],
        "checksums": {...: str},
    }
    values = read_record_file(file, FORMAT, VERSION, form)
    if values["layout"] not in get_args(Layout) or not {*values["dtypes"].values()} <= DTYPES.keys():
        raise DataError(f"{file}: names a layout or an element type that does not exist; convert the folder again")
    return Record(**{key: values[key] for key in Record.__dataclass_fields__})


def read_record_file(
    file: Path, kind: str, version: int, form: dict[Any, Any], remedy: str = "delete it if it is not needed"
) -> dict[str, Any]:
    """The values of a JSON file that moeport writes beside tensors.

    Args:
        file: exists.
        kind: its "format".
        version: the one that is read.
        form: types of its other values, as `check_types` takes them.
        remedy: what a user can do about a damaged one.

    Raises DataError if it is damaged, or of another format or version.
    """
    try:
        values = read_json(file, limit=2**30)
        check_types(values, {"format": str, "format_version": int})
        if values["format"] != kind:
            raise ValueError(f'it has no "format": "{kind}"')
        if values["format_version"] != version:
            raise ValueError(f"format version {values['format_version']}, and this moeport reads {version}")
        check_types(values, form)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}; {remedy}") from error
    found: dict[str, Any] = values
    return found
