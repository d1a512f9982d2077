"""Plants the faults of the table, and prints what the reports say: the table of docs/parity.md.

python -m tests.faults.planting
"""

from __future__ import annotations

import re
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import moeport.parity.run
from moeport.parity.record import record
from moeport.parity.result import Comparison
from moeport.parity.subject import Subject
from tests.faults.flips import Flip, make_flip
from tests.faults.planted import DIVIDED, PLANTED, Planted
from tests.parity.tiny import SIZE, subject

DTYPES = ("fp32", "bf16")
NONE = Planted("none", "no fault", "nothing")
STEPS = 3


class Garden:
    """Compares a sound side with a faulty one; subjects are made once.

    Args:
        folder: for the config and the data.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._subjects: dict[tuple[str, ...], Subject] = {}
        self._flips: dict[str, Flip] = {}

    def compare(self, planted: Planted, dtype: str, flip: bool) -> Comparison:
        """The sound side against the faulty one, which with `flip` also decides a tie otherwise."""
        a, b = self._subject(dtype, planted.base), self._subject(dtype, planted.base + planted.overrides)
        if flip:
            found = self._flip(dtype)
            a, b = found.prepare(a), found.prepare(b)
        a, b = planted.both(a), planted.change(planted.both(b))
        b = replace(found.turn(b) if flip else b, name="faulty")

        def record_side(side: Subject, **options):
            with planted.patch() if side.name == "faulty" else nullcontext():
                return record(side, **options)

        with mock.patch.object(moeport.parity.run, "record", record_side):
            return moeport.parity.run.compare_subjects((a, b), STEPS).comparisons[0]

    def _subject(self, dtype: str, overrides: tuple[str, ...]) -> Subject:
        key = (dtype, *overrides)
        if key not in self._subjects:
            size = replace(SIZE, micro_batches=2) if DIVIDED[0] in overrides else SIZE
            keys = [each for each in overrides if each not in DIVIDED]
            self._subjects[key] = subject(self.folder, f"torch-cpu:{dtype}", overrides=keys, size=size)
        return self._subjects[key]

    def _flip(self, dtype: str) -> Flip:
        if dtype not in self._flips:
            self._flips[dtype] = make_flip(self._subject(dtype, ()))
        return self._flips[dtype]


def is_found(planted: Planted, found: Comparison) -> bool:
    """Whether a failure names the fault in the first line, or a warning has a reason."""
    if found.verdict == "warn":
        return bool(found.reasons)
    return found.verdict == "fail" and bool(re.search(planted.says, found.headline))


def main() -> None:
    """Print the table in Markdown."""
    cases = [(dtype, flip) for dtype in DTYPES for flip in (False, True)]
    heads = [f"{dtype}, {'a flip' if flip else 'no flip'}" for dtype, flip in cases]
    print(f"| Fault | {' | '.join(heads)} | First line, fp32 without a flip |\n|{'---|' * (len(cases) + 2)}")
    counts = {"pass": 0, "warn": 0, "fail": 0}
    with tempfile.TemporaryDirectory() as folder:
        garden = Garden(Path(folder))
        for planted in (NONE, *PLANTED):
            found = [garden.compare(planted, dtype, flip) for dtype, flip in cases]
            for each in found if planted is not NONE else ():
                counts[each.verdict] += 1
            line = found[0].headline.partition(" (")[0].partition("; ")[0].replace("|", "\\|")
            verdicts = " | ".join(each.verdict.upper() for each in found)
            print(f"| {planted.group}: {planted.name} | {verdicts} | `{line[:100]}` |", flush=True)
    print(f"\n{len(PLANTED)} faults, {sum(counts.values())} comparisons: {counts}")


if __name__ == "__main__":
    main()
