"""Which steps' lists are in metrics.jsonl, so that the file stays bounded, however large the model and long the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeport.training.metrics_table import PER_LAYER

LOADS = "expert_load"
"""The metric with an entry for every expert."""
NUMBERS = 2**20
"""Numbers that lists of one kind take, before every second step is left out; again half as many with every doubling."""


class Thinning:
    """Decides which lists of a step are written. It depends on the step alone, so a resumed run writes the same lines.

    Lists of the first and the last step are always written, and those of a step with loads are complete. Numbers are
    written for every step.

    Args:
        interval: steps between the loads of all experts; None: as many as NUMBERS allows.
        last_step: the last step of the run; None: not known.
    """

    def __init__(self, interval: int | None = None, last_step: int | None = None):
        self.interval, self.last_step = interval, last_step

    def kept(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The metrics of a step that are written, by name."""
        step = values["step"]
        loads = _numbers(values[LOADS])
        others = sum(_numbers(entries) for name, entries in values.items() if name in PER_LAYER and name != LOADS)
        if self._writes(step, loads, self.interval):
            return values
        kept = PER_LAYER - {LOADS} if self._writes(step, others, None) else frozenset()
        return {name: value for name, value in values.items() if name not in PER_LAYER or name in kept}

    def _writes(self, step: int, numbers: int, interval: int | None) -> bool:
        if step in (1, self.last_step):
            return True
        return step % (interval or stride(step, numbers)) == 0


def _numbers(entries: list[Any]) -> int:
    """How many numbers a list holds, or lists of equal length."""
    return len(entries) * (len(entries[0]) if entries and isinstance(entries[0], list) else 1)


def stride(step: int, numbers: int) -> int:
    """The power of two of which a step must be a multiple for its lists to be written.

    Args:
        step: counted from 1.
        numbers: in the lists of a step.
    """
    every = 1
    while step // every * numbers > NUMBERS:
        every *= 2
    return every
