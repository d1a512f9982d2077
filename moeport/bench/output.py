"""Results of a communication benchmark as a table, JSON and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeport.bench.measure import Row

if TYPE_CHECKING:
    from rich.table import Table


def table(rows: Sequence[Row]) -> Table:
    """The columns of nccl-tests, and what it lacks: spread and bytes between nodes."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("operation", "type", "redop", "root"):
        shown.add_column(heading)
    for heading in ("size\n(B)", "count", "time\n(us)", "algbw\n(GB/s)", "busbw\n(GB/s)", "#wrong"):
        shown.add_column(heading, justify="right")
    for heading in ("quartiles\n(us)", "fastest rank\n(us)", "between nodes\n(B)"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.operation,
            row.type,
            row.redop,
            str(row.root),
            str(row.size),
            str(row.count),
            f"{row.time_us:.1f}",
            f"{row.algbw:.3f}",
            f"{row.busbw:.3f}",
            "N/A" if row.wrong is None else str(row.wrong),
            f"{row.low_us:.0f} .. {row.high_us:.0f}",
            f"{row.fastest_us:.1f}",
            str(row.inter_node_bytes),
        )
    return shown


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """All rows, and what they were measured on."""
    path.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line for each row, with a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
