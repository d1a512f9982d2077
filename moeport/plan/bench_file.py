"""A file of `moeport bench comm --json`, checked before anything is computed from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moeport.comm.communicator import ITEM_BYTES
from moeport.comm.exchange import EXCHANGES
from moeport.errors import UserError
from moeport.reading import NUMBER, check_types, read_json

ALL_REDUCE = "all_reduce"
MAX_RANKS, MAX_EXPERTS, MAX_BYTES = 2**20, 2**20, 2**50
"""Far above any cluster; what is larger would take the planner hours."""
_FORM = {"nodes": [(int, str)], "ranks": int, "rows": [{"operation": str}]}
_OF_ROWS = {
    "device": str,
    "emulated": bool,
    "traffic": str,
    "width": int,
    "top_k": int,
    "experts": int,
    "backward": bool,
}
_ROW = {"type": str, "size": int, "time_us": NUMBER}


def read_bench(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was measured on which cluster, and the rows of exchanges and all-reduces.

    Raises UserError for another file, or one with numbers that nothing can have measured.
    """
    try:
        about = read_json(path)
        check_types(about, _FORM)
        rows = [row for row in about["rows"] if row["operation"] in (*EXCHANGES, ALL_REDUCE)]
        if rows:
            check_types(about, _OF_ROWS)
        check_types(rows, [_ROW])
        _check_cluster(about, bool(rows))
        for row in rows:
            _check_row(about, row)
    except OSError as error:
        raise UserError(f"--from {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--from {path}: not a file of moeport bench comm --json ({error})") from error
    return about, rows


def _check_cluster(about: dict[str, Any], has_rows: bool) -> None:
    nodes, ranks = len(set(about["nodes"])), about["ranks"]
    _expect(0 < ranks <= MAX_RANKS, f"ranks is {ranks}, expected 1 to {MAX_RANKS:,}")
    _expect(nodes > 0 and ranks % nodes == 0, f"ranks is {ranks}, expected a multiple of the {nodes} nodes")
    if not has_rows:
        return
    experts, top_k, width = about["experts"], about["top_k"], about["width"]
    _expect(0 < experts <= MAX_EXPERTS, f"experts is {experts}, expected 1 to {MAX_EXPERTS:,}")
    _expect(experts % ranks == 0, f"experts is {experts}, expected a multiple of the {ranks} ranks")
    _expect(0 < top_k <= min(experts, 2**10), f"top_k is {top_k}, expected 1 to {min(experts, 2**10)}")
    _expect(0 < width <= MAX_BYTES, f"width is {width}, expected at least 1")


def _check_row(about: dict[str, Any], row: dict[str, Any]) -> None:
    kind, size, time = row["type"], row["size"], row["time_us"]
    _expect(kind in ITEM_BYTES, f"type is {kind[:40]!r}, expected one of {', '.join(ITEM_BYTES)}")
    least = 1 if row["operation"] == ALL_REDUCE else about["width"] * ITEM_BYTES[kind]
    _expect(least <= size <= MAX_BYTES, f"size is {size}, expected at least {least} bytes")
    _expect(math.isfinite(time) and 0 < time < 1e15, f"time_us is {time}, expected a time above 0")


def _expect(holds: bool, wrong: str) -> None:
    if not holds:
        raise ValueError(wrong)
