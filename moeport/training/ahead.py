"""Draws the batches of the next steps in a thread of its own, while the current one computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import TracebackType

from moeport.model.batch import Batch
from moeport.processes import usable_cores
from moeport.training.prepare import PreparedRun

STEPS_AHEAD = 2
"""Steps whose batches wait for their turn."""
END_SECONDS = 5.0
"""Longest time to wait for a batch that is being drawn when training ends."""

Draw = Callable[[int], Iterable[Batch]]
"""The micro-batches of a step, counted from 0."""


class DrawnAhead:
    """The batches of given steps, in order; a context manager, and a function as `draw` is.

    A batch depends on the number of its step alone, so it is the same whoever draws it. An error in drawing is raised
    when its step asks for the batch. Nothing is drawn beyond the last step.

    Args:
        draw: draws the micro-batches of a step.
        steps: the steps that will ask, in order.
    """

    def __init__(self, draw: Draw, steps: Iterable[int]):
        self._draw, self._steps = draw, steps
        self._drawn: SimpleQueue[list[Batch] | BaseException] = SimpleQueue()
        self._room = threading.Semaphore(STEPS_AHEAD)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> DrawnAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._room.release()
        self._thread.join(END_SECONDS)

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of the next of the steps."""
        found = self._drawn.get()
        self._room.release()
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self) -> None:
        for step in self._steps:
            self._room.acquire()
            if self._ended.is_set():
                return
            try:
                self._drawn.put(list(self._draw(step)))
            except BaseException as error:
                self._drawn.put(error)
                return


@contextmanager
def drawn_ahead(run: PreparedRun) -> Iterator[None]:
    """Lets the trainer of a run take batches that are drawn ahead, inside the block, if that pays off."""
    if not pays_off(run.backend.device, usable_cores()):
        yield
        return
    training, trainer = run.config.training, run.trainer
    steps = (step for step in range(run.start_step, training.steps) if not training.skips(step + 1))
    draw = trainer.draw
    try:
        with DrawnAhead(trainer.batches.of_step, steps) as trainer.draw:
            yield
    finally:
        trainer.draw = draw


def pays_off(device: str, cores: int) -> bool:
    """Whether the host has time to draw batches while the device computes.

    Where the CPU itself computes, a batch takes well under a thousandth of a step, and the thread would need the cores.

    Args:
        device: label of the device.
        cores: those that this process may use.
    """
    return device.split()[0] != "cpu" and cores > 1
