"""What a profile of some steps of a run measures, on one rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkTimes:
    """Where the time of the profiled steps went."""

    clock: str
    """What was timed: the thread that runs the steps (`cpu`), or the device (`device`)."""
    wall: float
    """Seconds from the beginning of the first step to the end of the last one, without pauses."""
    seconds: Mapping[str, float]
    """Seconds of each kind in `moeport.core.parts.KINDS`; their sum is `wall`."""
    overlapped: float
    """Seconds of communication while the thread or the device computed, which are in no kind."""
    others: Sequence[tuple[str, float]]
    """Operations that could not be attributed with their seconds, the longest first."""


@dataclass(frozen=True)
class HeldMemory:
    """Bytes that one step needs on one rank."""

    parameters: int
    copies: int
    """Of parameters in the compute type, where that is another one."""
    gradients: int
    optimizer: int
    activations: Mapping[str, int]
    """What the first micro-batch holds between its forward and its backward pass, by the kind of the part that kept it
    first; parameters are not counted."""
    peak: int | None
    """Peak of what the step allocated: activations, gradients as far as they were there, and temporary arrays; None:
    not known."""

    @property
    def temporary(self) -> int | None:
        """The peak beyond the activations; None: not known."""
        return None if self.peak is None else max(0, self.peak - sum(self.activations.values()))


class Profiler(ABC):
    """Measures steps of one model on one rank, with the framework's own profiler.

    Nothing is measured, and nothing slowed down, outside its blocks.
    """

    @abstractmethod
    def memory(self) -> AbstractContextManager[None]:
        """A block of one whole step, whose memory is measured."""

    @abstractmethod
    def step(self) -> AbstractContextManager[None]:
        """A block of one whole step, which is timed; the first one starts the trace."""

    @abstractmethod
    def paused(self) -> AbstractContextManager[None]:
        """A block between steps, such as an evaluation, whose time does not count."""

    @abstractmethod
    def finish(self, trace: Path) -> WorkTimes | None:
        """End the trace and write it.

        Args:
            trace: the file, or the folder if the framework writes several; without suffix.

        Returns: where the time went; None if the framework does not tell.
        """

    @property
    @abstractmethod
    def held(self) -> HeldMemory | None:
        """What `memory` measured; None: nothing yet, or the framework does not tell."""
