"""How often the host looks at what the device has done, and the ranks ask each other whether one of them must stop."""

from __future__ import annotations

import time

import numpy as np

from moeport.comm.communicator import Communicator

PERIOD_SECONDS = 1.0
"""About the longest time between two looks, unless a single step takes longer."""


class Pace:
    """Counts steps from one look to the next. All ranks look after the same steps, since they agree on the number.

    The number at most doubles from one look to the next, as the first steps say little about later ones.

    Args:
        world: the ranks.
        most: steps from one look to the next at most.
    """

    def __init__(self, world: Communicator, most: int):
        self.world, self.most = world, most
        self.steps = 1
        """From one look to the next."""
        self._done, self._since, self._seconds = 0, time.monotonic(), 0.0

    def stepped(self) -> None:
        """Count a step."""
        self._done += 1

    def is_due(self, wants_to_stop: bool) -> bool:
        """Whether to look now; a process by itself also does when it is to stop."""
        return self._done >= self.steps or (wants_to_stop and self.world.size == 1)

    def looked(self) -> None:
        """Note that the steps so far are done; what follows until `agree` counts for no step."""
        self._seconds = (time.monotonic() - self._since) / max(self._done, 1)

    def agree(self, wants_to_stop: bool) -> bool:
        """Whether any rank is to stop, so that all stop after the same step; every rank calls it after `looked`."""
        stops, total = self.world.sum_of_numbers(np.array([float(wants_to_stop), self._seconds]))
        possible = PERIOD_SECONDS * self.world.size / max(float(total), 1e-9)
        self.steps = max(1, int(min(possible, 2 * self.steps, self.most)))
        self._done, self._since = 0, time.monotonic()
        return bool(stops)
