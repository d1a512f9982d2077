"""Which experts the most frequent vocabulary ids go to, counted while a run trains.

The layers give what their routers chose anyway, and of every n-th step the host counts it; a step only stacks it by
layer. Shape suffixes as in `moeport.core.ops`; L layers with experts, X the ids that are watched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeport.core.array import Array
from moeport.model.loss_terms import CHOSEN_EXPERT, CHOSEN_TOKEN
from moeport.training.routing_spread import assignments_by

MOST_IDS = 32
"""The most vocabulary ids that are watched."""
NUMBERS = 2**16
"""The most counts that are kept of a time, for all layers together: a model of many experts has fewer ids watched."""


def watched(layers: int, experts: int) -> int:
    """How many vocabulary ids are watched in a model of L layers of E experts."""
    return max(1, min(MOST_IDS, NUMBERS // (layers * experts)))


@dataclass(frozen=True)
class KeptChoices:
    """What the routers chose for one micro-batch of this rank."""

    token_BS: np.ndarray
    """Its vocabulary ids."""
    arrays: Mapping[str, Array]
    """By the names in `moeport.model.loss_terms.KEPT`, (passes, L, N) on the device."""


class RoutingCounts:
    """Counts the assignments of vocabulary ids in every n-th step, before drops; each rank counts its own.

    Args:
        ids: the ids with their texts, most frequent first.
        layers: L.
        experts: E.
        interval: n.
    """

    def __init__(self, ids: Mapping[int, str], layers: int, experts: int, interval: int):
        self.ids, self.layers, self.experts, self.interval = ids, layers, experts, interval
        id_X = np.array(list(ids), np.int64)
        self._order_X = np.argsort(id_X)
        self._sorted_X = id_X[self._order_X]
        self.count_LXE = np.zeros((layers, len(ids), experts), np.int64)
        """Since they were last taken."""
        self.steps = 0
        """Steps that they are of."""

    def samples(self, step: int) -> bool:
        """Whether a step, counted from 0, is one of those that are counted."""
        return (step + 1) % self.interval == 0

    def add(self, parts: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]]) -> None:
        """Count a step.

        Args:
            parts: of each micro-batch the ids and the arrays of `KeptChoices`, on the host.
        """
        self.steps += 1
        for token_BS, arrays in parts:
            row_T = self._rows(token_BS.reshape(-1))
            expert_PLN = arrays[CHOSEN_EXPERT].astype(np.int64)
            choices = expert_PLN.shape[-1]
            if CHOSEN_TOKEN in arrays:
                row_PLN = row_T[arrays[CHOSEN_TOKEN]]
            else:
                row_PLN = np.broadcast_to(np.repeat(row_T, choices // len(row_T)), expert_PLN.shape)
            for layer in range(self.layers):
                row_N, expert_N = (x_PLN[:, layer].reshape(-1) for x_PLN in (row_PLN, expert_PLN))
                self.count_LXE[layer] += assignments_by(row_N, expert_N, len(self.ids), self.experts)

    def take(self) -> tuple[int, np.ndarray]:
        """The number of steps that were counted, and the counts (L, X, E); both start again from 0."""
        found = self.steps, self.count_LXE
        self.steps, self.count_LXE = 0, np.zeros_like(self.count_LXE)
        return found

    def _rows(self, id_T: np.ndarray) -> np.ndarray:
        """The place of each id among those watched; X for another."""
        last = len(self._sorted_X) - 1
        place_T = np.minimum(np.searchsorted(self._sorted_X, id_T), last)
        found: np.ndarray = np.where(self._sorted_X[place_T] == id_T, self._order_X[place_T], last + 1)
        return found
