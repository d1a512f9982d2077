"""The one file that the kit writes: results, reports and what the processes printed, without what is private."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeport.files import atomic_file
from moeport.kit.private import LEFT_OUT, VARIABLES, Scrubber
from moeport.kit.result import Result
from moeport.parity.result import worst
from moeport.version import VERSION, commit

FORMAT, FORMAT_VERSION = "moeport-kit", 1
RESULTS_FILE, README_FILE = "kit.json", "README.txt"
README = f"""This file was written by `moeport kit`, of moeport {VERSION}.

kit.json      results of each part, the machine in general terms, and a checksum of every other file
reports/      the details of some parts
logs/         what the processes of each part printed, cut to its beginning and end

Left out or replaced: {LEFT_OUT}.
The variables that are kept, where they are set: {", ".join(VARIABLES)}.

`moeport kit show FILE -o page.html` turns it into a page.
"""


@dataclass(frozen=True)
class PartRecord:
    """A part that has run, or why it has not."""

    name: str
    title: str
    result: Result
    seconds: float
    log: str = ""


@dataclass
class Contents:
    """What is packed."""

    asked: Mapping[str, Any]
    """Backend, device, ranks, parts."""
    machine: Mapping[str, Any]
    date: str
    parts: list[PartRecord] = field(default_factory=list)
    interrupted: bool = False

    @property
    def verdict(self) -> str:
        """Fail if a part has failed, or was to run and did not; warn if one has not examined everything."""
        return worst(["fail" if self.interrupted else "pass", *(part.result.verdict for part in self.parts)])


def write_kit(path: Path, contents: Contents, scrubber: Scrubber) -> None:
    """Write the file. Raises WriteError."""
    files = {README_FILE: README}
    records = []
    for part in contents.parts:
        if part.log.strip():
            files[f"logs/{part.name}.txt"] = scrubber.text(part.log)
        for name, value in part.result.files.items():
            files[f"reports/{name}"] = json.dumps(scrubber.value(value), indent=0) + "\n"
        records.append(_record(part, scrubber))
    found = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "moeport": VERSION,
        "commit": commit(),
        "date": contents.date,
        "verdict": contents.verdict,
        "interrupted": contents.interrupted,
        "asked": contents.asked,
        "machine": scrubber.value(contents.machine),
        "parts": records,
        "files": {name: _digest(text) for name, text in files.items()},
    }
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in {RESULTS_FILE: json.dumps(found, indent=1) + "\n", **files}.items():
            file.writestr(name, text)


def _record(part: PartRecord, scrubber: Scrubber) -> dict[str, Any]:
    result = part.result
    return {
        "name": part.name,
        "title": part.title,
        "verdict": result.verdict,
        "seconds": round(part.seconds, 1),
        "summary": scrubber.text(result.summary),
        "figures": scrubber.value(result.figures),
        "tables": [scrubber.value(asdict(table)) for table in result.tables],
        "data": scrubber.value(result.data),
        "log": f"logs/{part.name}.txt" if part.log.strip() else None,
        "reports": sorted(f"reports/{name}" for name in result.files),
    }


def _digest(text: str) -> dict[str, Any]:
    data = text.encode()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def describe_contents() -> Sequence[str]:
    """Lines that say, before anything runs, what the file will hold."""
    return (
        "the file holds: results and times, names and versions of devices, frameworks and packages, kind of processor, "
        "what the processes printed",
        f"left out or replaced: {LEFT_OUT}",
    )
