"""What a part of the kit has found: plain data that any page can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moeport.pages.tables import Table

Verdict = Literal["pass", "warn", "fail", "skipped"]
"""`warn`: nothing was found to be wrong, and not everything was examined."""
WORDS: Mapping[Verdict, str] = {"pass": "passed", "warn": "with a warning", "fail": "failed", "skipped": "skipped"}
"""After the number of parts, or before their names."""


@dataclass(frozen=True)
class Result:
    """The result of a part."""

    verdict: Verdict
    summary: str
    """One sentence."""
    figures: Sequence[tuple[str, str, str]] = ()
    """Label, value, note."""
    tables: Sequence[Table] = ()
    data: Any = None
    """Everything of it that a program might read."""
    files: Mapping[str, Any] = field(default_factory=dict)
    """Larger values for JSON, by the name of their file."""


def judgement(wrong: bool, examined: int, summary: str, expected: int = 1, **details: Any) -> Result:
    """The result of a part by what it has examined.

    Args:
        wrong: whether something is wrong: the part fails.
        examined: number of things that were examined: a part that has examined fewer than `expected` does not pass.
        summary: one sentence.
        expected: number of things that there are to examine.
        details: the other fields of the result.
    """
    if wrong:
        return Result("fail", summary, **details)
    if not examined:
        return Result("warn", "nothing was examined", **details)
    if examined < expected:
        return Result("warn", f"{expected - examined:,} of {expected:,} were not examined; {summary}", **details)
    return Result("pass", summary, **details)


@dataclass(frozen=True)
class Crash:
    """A case that ended its process."""

    label: str
    ending: str


@dataclass(frozen=True)
class Outcome:
    """What the processes of one stage of a part have left."""

    value: Any = None
    """What the work returned; None if it did not come to that."""
    events: Sequence[Any] = ()
    """What it had found by the end, case by case."""
    crashes: Sequence[Crash] = ()
    """Cases that ended the process; a new one went on after them."""
    ending: str | None = None
    """Why it ended before it was done; None: it was done."""

    @property
    def done(self) -> list[Any]:
        """What it noted at the end of each case."""
        return [event for event in self.events if "end" in event]

    @property
    def reached(self) -> int:
        """Number of cases that were examined, those that ended the process included."""
        return len(self.done) + len(self.crashes)

    @property
    def expected(self) -> int:
        """Number of cases that there are to examine; at least 1."""
        return max(self.value["cases"] if self.value else self.reached, 1)
