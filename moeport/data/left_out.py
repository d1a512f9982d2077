"""What of a source is left out, and how that is said."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from moeport.data.shared import Marks
from moeport.pages.words import counted

MAX_LISTED = 20
"""Faults that a message lists; it counts the others."""


@dataclass
class LeftOut:
    """Files, rows and documents of a source that are not used."""

    unreadable: int = 0
    """Files and rows that cannot be read."""
    other_names: int = 0
    """Further names of files that are read already: hard and symbolic links."""
    shared: int = 0
    """Documents that are left out of one side of the split, since their text is on the other."""
    marks: Marks | None = None
    """Which documents of the side that loses them these are; None: not known."""
    kept_side: str = ""
    """The side that keeps them: training or validation."""
    is_exchanged: bool = False
    """Whether a document changed sides, since the rule of the split left one without text."""
    notes: list[str] = field(default_factory=list)
    """What was skipped in folders."""
    faults: list[str] = field(default_factory=list)
    """The first `MAX_LISTED` reasons for which files and rows cannot be read."""

    def add_fault(self, fault: str) -> None:
        """Count a file or row that cannot be read; the message begins with its place."""
        self.unreadable += 1
        if len(self.faults) < MAX_LISTED:
            self.faults.append(fault)

    def add_folder(self, folder: str, passed_over: Counter[str]) -> None:
        """Note how many entries of a folder were passed over, by what sets them apart, such as `hidden`."""
        if passed_over:
            kinds = ", ".join(
                f"{number:,} {kind}"
                for kind, number in sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
            )
            self.notes.append(f"skipped in {folder}: {kinds}")

    def lines(self) -> list[str]:
        """What to print about it."""
        lines = list(self.notes)
        if self.other_names:
            lines.append(f"{counted(self.other_names, 'further name')} of files that are read already (links)")
        if self.shared:
            lines.append(
                f"{counted(self.shared, 'document')} left out, since the same text is used for {self.kept_side}"
            )
        if self.unreadable:
            what = f"{counted(self.unreadable, 'file or row', 'files or rows')} that cannot be read"
            lines.append(f"skipped {what} (data.source.bad_files): {self.listed('; ')}")
        return lines

    def listed(self, separator: str) -> str:
        """The first faults, and the number of the others."""
        more = self.unreadable - len(self.faults)
        return separator.join([*self.faults, *([f"and {more:,} more"] if more else [])])
