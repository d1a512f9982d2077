"""What a tracker is told, and what it must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """The metrics of a step or an evaluation."""

    step: int
    """Counted from 1."""
    time: float
    """When it was recorded, in seconds since the epoch."""
    values: Mapping[str, float]
    """By tag, as in TensorBoard; NaN and infinities as they are."""


class Ending(Enum):
    """How a run ends for this process."""

    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """By a signal; it can be resumed."""


@dataclass(frozen=True)
class Start:
    """What a tracker is told when it starts."""

    folder: Path
    """Where it may keep files."""
    config: Mapping[str, Any]
    """The whole config: nested mappings of JSON values."""
    done: int = 0
    """Steps done before."""
    project: str = ""
    """Project or experiment that the run belongs to."""
    label: str = ""
    """Name of the run there."""
    online: bool = False
    """Whether to send values to the service that the client is set up for."""
    run_id: str | None = None
    """Identifier of the run to continue; None: a new one."""

    @property
    def is_new(self) -> bool:
        """Whether the tracker has not seen this run."""
        return self.run_id is None


class Tracker(ABC):
    """One tracker of one run, made from a `Start`; a thread of its own makes it and calls it.

    It may raise any exception and take any time: neither reaches training.
    """

    run_id = ""
    """Identifier by which a resumed run continues; empty if it needs none."""

    @abstractmethod
    def log(self, rows: Sequence[Row]) -> None:
        """Take rows in order; after a resume some may come again."""

    @abstractmethod
    def summary(self, values: Mapping[str, Any]) -> None:
        """Take the summary of a finished run: nested mappings of JSON values."""

    @abstractmethod
    def close(self, ending: Ending) -> None:
        """Write out or send what is pending."""


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{below}": each for below, each in flat(value).items()}
        else:
            found[key] = value
    return found


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of nested mappings, by dotted key."""
    return {key: value for key, value in flat(values).items() if type(value) in (int, float)}
