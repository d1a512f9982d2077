"""The table of the parts."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from moeport.kit.options import PART_NAMES
from moeport.kit.result import Outcome, Result
from moeport.kit.task import Task

Stage = Literal["one", "all"]
"""Whether one process computes, or one per device."""


class Work(Protocol):
    """A module of `moeport.kit.checks`."""

    def work(self, task: Task) -> Any:
        """Runs in the processes of a stage. Returns what can be written as JSON; that of rank 0 is kept."""

    def judge(self, outcomes: Sequence[Outcome]) -> Result:
        """Runs in the kit's own process, with what each stage has left."""


@dataclass(frozen=True)
class Part:
    """One part."""

    name: str
    title: str
    """What it does, after `moeport kit` and its number."""
    minutes: int
    """Time limit of each stage."""
    stages: tuple[Stage, ...] = ("one",)
    least_ranks: int = 1
    """Ranks without which it is skipped."""
    partial: bool = False
    """Whether it is judged by the stages and cases that were done, where another was ended."""
    fallback: bool = False
    """Whether its second stage is for when the first one does not pass."""
    text: bool = False
    """Whether its processes need the kit's text in their folder."""
    cases: bool = False
    """Whether it computes case by case: after one that ends the process, a new process goes on."""

    def module(self) -> Work:
        """What computes and judges it."""
        found: Any = importlib.import_module(f"moeport.kit.checks.{self.name}")
        return found


PARTS = (
    Part("doctor", "what is installed and what works", 10),
    Part("device", "the device, its compute types and its kernels", 10),
    Part("probe", "the values of every collective", 10, ("all",), least_ranks=2),
    Part("conformance", "every operation against its formula, forward and backward", 60, partial=True, cases=True),
    Part("kernels", "the chosen kernels against composed ones: values, gradients, times", 30, partial=True, cases=True),
    Part(
        "exchange",
        "the values of uneven all-to-alls on more than two ranks",
        10,
        ("all", "all"),
        3,
        partial=True,
        fallback=True,
    ),
    Part("determinism", "two runs, bit for bit", 20, ("one", "one")),
    Part("comm", "the speed of collectives and of expert exchanges", 20, ("all",), least_ranks=2),
    Part("train", "a short training, alone and on all ranks", 30, ("one", "all"), partial=True, text=True),
    Part("parity", "a recording from a CPU, which comes with moeport, against this device", 30, text=True),
)
assert tuple(part.name for part in PARTS) == PART_NAMES
