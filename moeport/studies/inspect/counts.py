"""Where the assignments of one layer go: counted by token id, by position and by dataset, portion by portion.

Shape suffixes as in `moeport.core.ops`; X are the vocabulary ids that occur, P ranges of positions, Y datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.studies.inspect.texts import Portion
from moeport.studies.inspect.walk import Layer, Routed
from moeport.training.routing_spread import assignments_by

RANGES = 32
"""Most ranges that the positions of a sequence are divided into."""


@dataclass(frozen=True)
class Keys:
    """What assignments are counted by; the same for all layers and checkpoints."""

    id_X: np.ndarray
    """Vocabulary ids that occur, ascending."""
    length: int
    """S: positions of the longest sequence."""
    datasets: tuple[str, ...]

    @classmethod
    def of(cls, portions: Sequence[Portion]) -> Keys:
        """Those of a text."""
        ids = np.unique(np.concatenate([np.unique(portion.batch.token_BS) for portion in portions]))
        length = max(portion.batch.token_BS.shape[1] for portion in portions)
        return cls(ids, length, tuple(dict.fromkeys(portion.dataset for portion in portions)))

    @property
    def edges(self) -> np.ndarray:
        """First positions of the ranges, and S, (P + 1,)."""
        ranges = min(RANGES, self.length)
        return np.arange(ranges + 1) * self.length // ranges


@dataclass(frozen=True)
class LayerCounts:
    """Assignments of one layer: those that the router made, before drops, and those of them that were dropped."""

    id_XE: np.ndarray
    position_PE: np.ndarray
    dataset_YE: np.ndarray
    dropped_P: np.ndarray
    dropped_Y: np.ndarray
    capacities: tuple[int, ...]
    """The capacity of each portion; empty if there is no limit."""
    busiest: tuple[int, ...]
    """Assignments to the busiest expert in each portion."""
    mean_load: float
    """Assignments per expert and portion."""

    @property
    def load(self) -> np.ndarray:
        """Assignments to each expert (E,)."""
        found: np.ndarray = self.position_PE.sum(0)
        return found

    @property
    def drop_rate(self) -> float:
        """Share of the assignments that were dropped."""
        return float(self.dropped_P.sum() / max(1, self.load.sum()))

    @property
    def drop_rates(self) -> np.ndarray:
        """Share of the assignments of each range of positions that were dropped, (P,); NaN without any."""
        return _ratio(self.dropped_P, self.position_PE.sum(1))

    @property
    def dataset_drop_rates(self) -> np.ndarray:
        """Share of the assignments of each dataset that were dropped, (Y,); NaN without any."""
        return _ratio(self.dropped_Y, self.dataset_YE.sum(1))


def count(layer: Layer, keys: Keys) -> LayerCounts:
    """Count the assignments of one layer.

    Args:
        layer: what it did with the text.
        keys: what to count by.
    """
    experts, edges = layer.num_experts, keys.edges
    ids, places, sets = (
        np.zeros((rows, experts), np.int64) for rows in (len(keys.id_X), len(edges) - 1, len(keys.datasets))
    )
    dropped_P, dropped_Y = np.zeros(len(edges) - 1, np.int64), np.zeros(len(keys.datasets), np.int64)
    for routed in layer.routed:
        token_BS = routed.portion.batch.token_BS
        made_N = routed.expert_N < experts
        token_N, expert_N = routed.token_N[made_N], routed.expert_N[made_N]
        lost_N = ~routed.served_N[made_N]
        row_N = np.searchsorted(keys.id_X, token_BS.reshape(-1)[token_N])
        range_N = np.searchsorted(edges, token_N % token_BS.shape[1], "right") - 1
        dataset = keys.datasets.index(routed.portion.dataset)
        ids += assignments_by(row_N, expert_N, len(ids), experts)
        places += assignments_by(range_N, expert_N, len(places), experts)
        np.add.at(sets[dataset], expert_N, 1)
        np.add.at(dropped_P, range_N[lost_N], 1)
        dropped_Y[dataset] += lost_N.sum()
    capacities = tuple(routed.capacity for routed in layer.routed if routed.capacity is not None)
    busiest = tuple(int(_loads(routed, experts).max()) for routed in layer.routed)
    mean_load = float(places.sum() / experts / len(layer.routed))
    return LayerCounts(ids, places, sets, dropped_P, dropped_Y, capacities, busiest, mean_load)


def _loads(routed: Routed, experts: int) -> np.ndarray:
    return np.bincount(routed.expert_N, minlength=experts + 1)[:experts]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(whole > 0, part / whole, np.nan)
    return found
