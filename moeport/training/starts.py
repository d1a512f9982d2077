"""When, where and how a run was started and resumed: RUN_DIR/starts.jsonl, one line per start."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from moeport.files import write_text
from moeport.reading import read_lines
from moeport.version import commit

STARTS_FILE = "starts.jsonl"


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    step: int
    """Steps done before; 0 for a new run."""
    time: str
    """Date and time in UTC, as in `2026-11-28 09:30:00`."""
    host: str
    """Name of the first rank's host."""
    command: str
    """The command line of the first rank."""
    ranks: int
    """Number of ranks."""
    data: str
    """Describes the data: documents, bytes, tokens."""
    commit: str = ""
    """The commit of moeport, with `-dirty` if its sources had been changed since; empty if it is not known."""


def record_start(run_dir: Path, step: int, ranks: int, data: str) -> None:
    """Add a line on this start; the first rank calls it.

    Args:
        run_dir: the run folder.
        step: steps done before.
        ranks: number of ranks.
        data: describes the data.
    """
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name  # of python -m moeport
    command = shlex.join([name, *sys.argv[1:]])
    start = Start(step, now, platform.node(), command, ranks, " ".join(data.split()), commit() or "")
    lines = [*(json.dumps(asdict(each)) for each in read_starts(run_dir)), json.dumps(asdict(start))]
    write_text(run_dir / STARTS_FILE, "\n".join(lines) + "\n")


def read_starts(run_dir: Path) -> list[Start]:
    """All starts of a run in order; lines that are damaged are left out."""
    try:
        lines = list(read_lines(run_dir / STARTS_FILE))
    except OSError:
        return []
    return [start for line in lines if (start := _start(line))]


def _start(line: str) -> Start | None:
    try:
        values = json.loads(line)
        start = Start(**{field.name: values[field.name] for field in fields(Start) if field.name in values})
    except (ValueError, TypeError, RecursionError):
        return None
    types = {field.name: int if field.type == "int" else str for field in fields(Start)}
    return start if all(type(getattr(start, name)) is kind for name, kind in types.items()) else None
