"""Reading a file of the kit, which came from somebody else: in bounded memory, and nothing is unpacked to disk."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeport.errors import UserError
from moeport.kit.pack import FORMAT, FORMAT_VERSION, RESULTS_FILE
from moeport.reading import NUMBER, check_types, parse_json, read_bytes

MAX_BYTES = 16 * 2**20
"""Of the file."""
MAX_ENTRIES = 200
MAX_UNPACKED = 64 * 2**20
"""Of everything in it."""
NAME = re.compile(r"(?:(?:logs|reports)/)?[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_FORM = {
    "moeport": str,
    "commit?": (str, type(None)),
    "date": str,
    "verdict": str,
    "interrupted": bool,
    "asked": dict,
    "machine": dict,
    "parts": [
        {
            "name": str,
            "title": str,
            "verdict": str,
            "seconds": NUMBER,
            "summary": str,
            "figures": [[str]],
            "tables": [{"title": str, "header": [str], "rows": [[str]]}],
            "log": (str, type(None)),
            "reports": [str],
        }
    ],
    "files": {...: {"bytes": int, "sha256": str}},
}


@dataclass(frozen=True)
class KitFile:
    """What such a file holds."""

    results: Mapping[str, Any]
    """kit.json, of the form that this module checks."""
    files: Mapping[str, str]
    """The other files by name."""


def read_kit(path: Path) -> KitFile:
    """Read and check a file.

    Raises UserError, which names the file and what is wrong with it, if it cannot be read, is damaged, was not written
    by `moeport kit`, or would unpack to more than it should.
    """
    try:
        data = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected a file of moeport kit") from error
    try:
        return _checked(_unpacked(data))
    except (ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: not a whole file of moeport kit: {error}; ask for it to be sent again") from error


def _unpacked(data: bytes) -> dict[str, bytes]:
    """The files by name. Raises ValueError or an error of zipfile."""
    if data.count(b"PK\x01\x02") > MAX_ENTRIES:  # before zipfile makes an object of each
        raise ValueError(f"it has more than {MAX_ENTRIES} entries")
    found: dict[str, bytes] = {}
    left = MAX_UNPACKED
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        for entry in file.infolist():
            name = entry.filename
            if not NAME.fullmatch(name):
                raise ValueError(f"it has a file named {name[:100]!r}")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is not compressed in the way moeport does")
            if name in found:
                raise ValueError(f"it has two files named {name}")
            with file.open(entry) as opened:
                found[name] = opened.read(left + 1)
            left -= len(found[name])
            if left < 0:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED:,} bytes")
    return found


def _checked(found: dict[str, bytes]) -> KitFile:
    """Raises ValueError."""
    if RESULTS_FILE not in found:
        raise ValueError(f"it has no {RESULTS_FILE}")
    results = parse_json(found.pop(RESULTS_FILE))
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ValueError(f'{RESULTS_FILE} has no "format": "{FORMAT}"')
    version = results.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}, and this moeport reads {FORMAT_VERSION}: use another moeport")
    check_types(results, _FORM)
    for part in results["parts"]:
        for figure in part["figures"]:
            if len(figure) != 3:
                raise ValueError(f"a figure of {part['name']} has {len(figure)} texts, expected 3")
    expected = results["files"]
    if expected.keys() != found.keys():
        raise ValueError(f"it holds {', '.join(sorted(found))[:200]}, and {RESULTS_FILE} lists {len(expected)} files")
    for name, data in found.items():
        if hashlib.sha256(data).hexdigest() != expected[name]["sha256"]:
            raise ValueError(f"{name} does not match its checksum")
    return KitFile(results, {name: data.decode(errors="replace") for name, data in found.items()})
