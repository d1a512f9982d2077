"""routing.json of a run: which experts the most frequent vocabulary ids go to, in at most RECORDS stretches of steps.

The file is written whole, each time in place of the one before. A checkpoint inside a stretch divides it into pieces,
so that a resume continues from exactly what had been counted by then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeport.comm.communicator import Communicator
from moeport.errors import DataError
from moeport.files import write_text
from moeport.reading import read_json
from moeport.training.routing_counts import RoutingCounts
from moeport.training.run_dir import ROUTING_FILE

RECORDS = 32
"""The most stretches that a run is divided into."""
PIECES = 64
"""The most records in the file; then the oldest pieces of a stretch are added up."""


@dataclass(frozen=True)
class Record:
    """What was counted in some steps."""

    first: int
    """The first of them, counted from 1."""
    last: int
    steps: int
    """How many of them were counted."""
    ends: bool
    """Whether a stretch ends with it; otherwise the next record is another piece of the same."""
    count_LXE: np.ndarray
    """Assignments by layer, vocabulary id and expert, before drops."""

    def with_next(self, other: Record) -> Record:
        """This piece and the one that follows it, as one."""
        return Record(self.first, other.last, self.steps + other.steps, other.ends, self.count_LXE + other.count_LXE)


@dataclass(frozen=True)
class RoutingFile:
    """The contents of routing.json."""

    ids: Sequence[int]
    """The vocabulary ids, most frequent first."""
    names: Sequence[str]
    """Their texts."""
    records: Sequence[Record]
    """In the order of the steps."""

    @property
    def stretches(self) -> list[Record]:
        """The records with the pieces of each stretch added up."""
        found: list[Record] = []
        for record in self.records:
            if found and not found[-1].ends:
                found[-1] = found[-1].with_next(record)
            else:
                found.append(record)
        return found

    def until(self, step: int) -> RoutingFile:
        """What had been counted when a step was done."""
        return replace(self, records=[record for record in self.records if record.last <= step])


class RoutingLog:
    """Writes routing.json, on the first rank; every rank calls it.

    Args:
        run_dir: the run folder.
        world: the ranks, each of which counts its own assignments.
        counts: of this rank.
        steps: of the whole run.
        start_step: steps done before, whose records stay.
    """

    def __init__(
        self,
        run_dir: Path,
        world: Communicator,
        counts: RoutingCounts,
        steps: int,
        start_step: int,
    ):
        self.path, self.world, self.counts, self.steps = run_dir / ROUTING_FILE, world, counts, steps
        self.stretch = counts.interval * -(-steps // (RECORDS * counts.interval))
        """Steps of a stretch."""
        self.first = start_step + 1
        self.notes: list[str] = []
        """What was wrong with the file that it continues."""
        self.file = RoutingFile([*counts.ids], [*counts.ids.values()], [])
        if start_step and world.rank == 0:
            self.file = self._continued(start_step)

    def is_due(self, step: int) -> bool:
        """Whether a stretch ends with a step."""
        return step == self.steps or step % self.stretch == 0

    def write(self, step: int) -> None:
        """Write what was counted up to a step, after which a stretch ends or a checkpoint is saved."""
        if step < self.first:
            return
        steps, count_LXE = self.counts.take()
        total_LXE = self.world.sum_of_numbers(count_LXE.astype(np.float64).reshape(-1)).reshape(count_LXE.shape)
        record = Record(self.first, step, steps, self.is_due(step), total_LXE.astype(np.int64))
        self.first = step + 1
        if self.world.rank == 0:
            self.file = replace(self.file, records=_fewer([*self.file.records, record]))
            write_text(self.path, _text(self.file))

    def _continued(self, start_step: int) -> RoutingFile:
        """What the file has of the steps done; nothing if it cannot be continued."""
        try:
            found = read_routing(self.path)
        except DataError as error:
            self.notes.append(f"{error}; the counts start again")
            return self.file
        shape = self.counts.count_LXE.shape
        if found is None:
            return self.file
        if found.ids != self.file.ids or any(record.count_LXE.shape != shape for record in found.records):
            self.notes.append(f"{self.path}: counts other ids or experts than those of this run; they start again")
            return self.file
        return replace(self.file, records=found.until(start_step).records)


def cut_routing(run_dir: Path, last_step: int) -> None:
    """Take the records of later steps out of the routing.json of a run that is resumed without counting."""
    path = run_dir / ROUTING_FILE
    try:
        found = read_routing(path)
    except DataError:
        return
    if found is not None and found.until(last_step) != found:
        write_text(path, _text(found.until(last_step)))


def read_routing(path: Path) -> RoutingFile | None:
    """The contents of a routing.json; None if there is none.

    Raises DataError if it is damaged.
    """
    if not path.exists():
        return None
    try:
        values = read_json(path)
        records = [_record(record) for record in values["records"]]
        found = RoutingFile([int(number) for number in values["ids"]], [str(x) for x in values["names"]], records)
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: is not the routing counts of a run: {error}") from error
    shapes = {record.count_LXE.shape for record in records}
    fits = len(shapes) <= 1 and all(len(shape) == 3 and shape[1] == len(found.ids) for shape in shapes)
    if any((record.count_LXE < 0).any() for record in records):
        raise DataError(f"{path}: is not the routing counts of a run: it has counts below 0")
    if not fits or len(found.ids) != len(found.names):
        raise DataError(f"{path}: is not the routing counts of a run: its lists do not fit each other")
    return found


def _record(values: dict[str, Any]) -> Record:
    return Record(
        int(values["first"]),
        int(values["last"]),
        int(values["steps"]),
        bool(values["ends"]),
        np.array(values["assignments"], np.int64),
    )


def _text(file: RoutingFile) -> str:
    records = [
        {"first": r.first, "last": r.last, "steps": r.steps, "ends": r.ends, "assignments": r.count_LXE.tolist()}
        for r in file.records
    ]
    return json.dumps({"ids": file.ids, "names": file.names, "records": records}, separators=(",", ":")) + "\n"


def _fewer(records: list[Record]) -> list[Record]:
    """At most PIECES records: the oldest pieces of a stretch are added up."""
    while len(records) > PIECES:
        place = next((i for i, record in enumerate(records[:-1]) if not record.ends), 0)
        records[place : place + 2] = [records[place].with_next(records[place + 1])]
    return records
