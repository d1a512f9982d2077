"""Uneven all-to-alls, with their gradients: every row on every rank.

Some libraries report success and deliver zeros on more than two ranks, so no expected value is 0, and what is wrong is
told from what is missing. Each rank writes what it has found to a file of its own: what it says must not depend on the
communication that is in question.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeport.backends.base import Backend
from moeport.comm.communicator import Communicator
from moeport.conformance.case import place
from moeport.core.array import Array
from moeport.kit.result import Outcome, Result, judgement
from moeport.kit.task import Task
from moeport.pages.tables import Table

WIDTH = 64
"""Columns of a row."""
NATIVE, COMPOSED = "by the library", "by sends and receives"
"""The library's own all-to-all, and one composed of messages between pairs, which moeport uses in place of a wrong one.
"""
WAYS = (NATIVE, COMPOSED)
"""By stage: the second one is tried where the first does not pass."""
DIRECTIONS = ("values", "gradients")
ROWS, MANY_ROWS = 96, 4096
"""Most rows that a rank sends to another."""


def work(task: Task) -> dict[str, Any]:
    """Every pattern in every type; the values of all ranks."""
    with task.world(task.dtypes[0]) as (backend, communicator):
        way = WAYS[task.stage]
        if way == COMPOSED and not communicator.compose_all_to_all():
            return {"ranks": communicator.size, "found": []}
        found = _every_pattern(task, backend, communicator, way)
        own = Path(task.folder, f"rank.{communicator.rank}.json")
        own.write_text(json.dumps(found), encoding="utf-8")
        communicator.barrier()
        everything = [
            json.loads(Path(task.folder, f"rank.{rank}.json").read_text()) for rank in range(communicator.size)
        ]
        return {"ranks": communicator.size, "found": [each for some in everything for each in some]}


def _every_pattern(task: Task, backend: Backend, communicator: Communicator, way: str) -> list[dict[str, Any]]:
    """What this rank receives, in every pattern and type."""
    return [
        {"way": way, "pattern": pattern, "dtype": dtype, **_exchange(backend, communicator, rows, dtype)}
        for dtype in (*task.dtypes, "index")
        for pattern, rows in patterns(communicator.size, task.quick)
    ]


def patterns(size: int, quick: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Names, and the rows that rank i sends to rank j."""
    i, j = np.indices((size, size))
    draw = np.random.default_rng(0)
    yield "uneven", (5 * i + 3 * j) % 7 + 1
    yield "a rank sends nothing", np.where(i == 1, 0, i + j + 1)
    yield "a rank gets nothing", np.where(j == size - 2, 0, i + j + 1)
    yield "all to one rank", np.where(j == size - 1, i + 1, 0)
    yield "to the next rank alone", np.where(j == (i + 1) % size, 3, 0)
    for number in range(2 if quick else 10):
        rows = draw.integers(1, ROWS, (size, size))
        yield f"random {number + 1}", np.where(draw.random((size, size)) < 0.25, 0, rows)
    if not quick:
        yield "many rows", draw.integers(1, MANY_ROWS, (size, size))


def _exchange(backend: Backend, communicator: Communicator, rows: np.ndarray, dtype: str) -> dict[str, Any]:
    """There and, for floats, the gradient back."""
    ops, rank = backend.ops, communicator.rank
    send, receive = rows[rank].tolist(), rows[:, rank].tolist()
    sent = np.concatenate([values(rank, j, rows[rank, j]) for j in range(communicator.size)])
    wanted = np.concatenate([values(i, rank, rows[i, rank]) for i in range(communicator.size)])
    if dtype == "index":
        got = communicator.all_to_all(ops.from_numpy(sent), send, receive)
        return {"values": compare(ops.to_numpy(got), wanted)}

    back = np.concatenate([values(rank, i, rows[i, rank], 100) for i in range(communicator.size)])
    returned = np.concatenate([values(j, rank, rows[rank, j], 100) for j in range(communicator.size)])
    weight = place(backend, back, dtype)

    def loss(params: Mapping[str, Array]) -> tuple[Array, Array]:
        got = communicator.all_to_all(params["x"], send, receive)
        return ops.sum(got * weight), got

    (_, got), gradients = backend.value_and_grad(loss, has_aux=True)({"x": place(backend, sent, dtype)})
    return {
        "values": compare(ops.to_numpy(got), wanted),
        "gradients": compare(ops.to_numpy(gradients["x"]), returned),
    }


def values(source: int, target: int, rows: int, shift: int = 0) -> np.ndarray:
    """What a rank sends to another, (rows, WIDTH): from 1 to 251, exact in every type, and never 0."""
    places = np.arange(rows * WIDTH).reshape(rows, WIDTH)
    return (31 * source + 7 * target + places + shift) % 251 + 1


def compare(got: np.ndarray, wanted: np.ndarray) -> dict[str, int]:
    """How many entries there should be, how many are wrong, and how many of these are 0."""
    if got.shape != wanted.shape:
        return {"entries": wanted.size, "wrong": wanted.size, "zeros": 0}
    wrong = got != wanted
    return {"entries": wanted.size, "wrong": int(wrong.sum()), "zeros": int((wrong & (got == 0)).sum())}


def judge(outcomes: Sequence[Outcome]) -> Result:
    """Passes if every entry on every rank is right, in whichever way it is sent."""
    values = [outcome.value for outcome in outcomes]
    found, ranks = [each for value in values for each in value["found"]], values[0]["ranks"]
    totals = {way: _totals([each for each in found if each["way"] == way]) for way in WAYS}
    groups = dict.fromkeys((each["way"], each["dtype"], each["pattern"]) for each in found)
    rows = []
    for group in groups:
        mine = [each for each in found if (each["way"], each["dtype"], each["pattern"]) == group]
        rows.append((*group, *(_said([each[d] for each in mine if d in each]) for d in DIRECTIONS)))
    bad = [row for row in rows if "wrong" in row[3] + row[4]]
    entries = sum(total["entries"] for total in totals.values())
    summary = f"all {entries:,} entries are right on {ranks} ranks"
    if bad:
        summary = "; ".join(_sentence(way, total, ranks) for way, total in totals.items() if total["entries"])
    table = Table.of("patterns", ("way", "type", "rows", *DIRECTIONS), bad + [row for row in rows if row not in bad])
    wrong = sum(total["wrong"] for total in totals.values())
    figures = [("entries", f"{entries:,}", f"on {ranks} ranks"), ("wrong", f"{wrong:,}", "")]
    return judgement(bool(bad), entries, summary, figures=figures, tables=[table], data=values)


def _totals(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    keys = ("entries", "wrong", "zeros")
    return {key: sum(each.get(d, {}).get(key, 0) for each in found for d in DIRECTIONS) for key in keys}


def _sentence(way: str, total: Mapping[str, int], ranks: int) -> str:
    if not total["wrong"]:
        return f"{way}, all {total['entries']:,} entries are right"
    zeros = f", {total['zeros']:,} of them zeros" if total["zeros"] else ""
    return f"{way}, {total['wrong']:,} of {total['entries']:,} entries are wrong on {ranks} ranks{zeros}"


def _said(found: Sequence[Mapping[str, int]]) -> str:
    if not found:
        return "—"
    wrong, zeros = sum(each["wrong"] for each in found), sum(each["zeros"] for each in found)
    return f"{wrong:,} wrong, {zeros:,} of them zeros" if wrong else "right"
