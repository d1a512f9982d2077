"""metrics.jsonl on a resume: exactly the records of the steps done, whatever has happened to the file."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from moeport.config.step_ranges import shown
from moeport.errors import DataError
from moeport.files import atomic_file, writing
from moeport.training.metrics_record import is_evaluation, parsed

Key = tuple[int, bool]
"""A step, and whether the record is its evaluation."""


class Cut:
    """Cuts a metrics.jsonl to the records of the first steps.

    A partial last line, which a kill leaves, goes silently. Other lines that are not records, and records that stand
    twice, go too, but then the file as it was is kept beside it.

    Args:
        path: the file; it need not exist.
        last_step: the last step whose records stay.
    """

    def __init__(self, path: Path, last_step: int):
        self.path, self.last_step = path, last_step
        self._places: dict[Key, int] = {}
        self._foreign = self._double = 0
        self._is_sorted = True
        self.notes: list[str] = []
        """What there is to say about it, a line each."""
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is not a regular file; remove it, and the records start again")
        with writing(path):
            if path.exists():
                self._find()
                self._keep_original()
                self._write()
        self._say_what_is_missing()

    @property
    def evaluated(self) -> bool:
        """Whether the evaluation after the last step is there."""
        return (self.last_step, True) in self._places

    def _find(self) -> None:
        """Find the last record of each step and each evaluation."""
        place, last = 0, (0, False)
        with self.path.open("rb") as file:
            for line in file:
                key = _key(line)
                if key is None:
                    self._foreign += line.endswith(b"\n")
                elif key[0] <= self.last_step:
                    self._double += key in self._places
                    self._is_sorted = self._is_sorted and key > last
                    self._places[key] = place
                    last = key
                place += len(line)

    def _keep_original(self) -> None:
        if not (self._foreign or self._double or not self._is_sorted):
            return
        names = (self.path.with_name(f"metrics.damaged{n if n > 1 else ''}.jsonl") for n in count(1))
        copy = next(path for path in names if not path.exists())
        with atomic_file(copy) as temporary:
            shutil.copyfile(self.path, temporary)
        wrong = [f"{self._foreign} lines that are not records"] if self._foreign else []
        wrong += [f"{self._double} duplicate records"] if self._double else []
        what = f"left out {' and '.join(wrong)}" if wrong else "sorted the records"
        self.notes.append(f"{self.path}: {what}; the file as it was is {copy}")

    def _write(self) -> None:
        with atomic_file(self.path) as temporary, temporary.open("wb") as kept, self.path.open("rb") as file:
            for key in sorted(self._places):
                file.seek(self._places[key])
                kept.write(file.readline().rstrip(b"\r\n") + b"\n")

    def _say_what_is_missing(self) -> None:
        stretches: list[tuple[int, int]] = []
        expected = 1
        for step in [*sorted(step for step, evaluated in self._places if not evaluated), self.last_step + 1]:
            if step > expected:
                stretches.append((expected, step - 1))
            expected = step + 1
        if stretches:
            some = shown(stretches[:3]) + (", ..." if len(stretches) > 3 else "")
            self.notes.append(f"{self.path}: has no records of steps {some}; summary and report are without them")


def _key(line: bytes) -> Key | None:
    """What a line records; None if it is no record."""
    try:
        record: Any = json.loads(line)
        parsed(record)
    except (ValueError, RecursionError):
        return None
    return record["step"], is_evaluation(record)
