"""Which sequences a step trains on: a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from typing_extensions import override

from moeport.config.data import SEQUENCES_PER_CYCLE
from moeport.core.parameters import generator


class Sampler:
    """Visits all sequences in a new random order every epoch.

    Sample j of step s has the global index g = s * batch_size + j, and is entry g mod num_sequences in the order of
    epoch g // num_sequences; a batch may span two epochs. To resume at a step, ask for that step.

    Args:
        num_sequences: sequences per epoch, at least 1.
        batch_size: sequences per step, over all ranks.
        seed: determines the orders.
        name: of the data, if each of several has orders of its own.
    """

    def __init__(self, num_sequences: int, batch_size: int, seed: int, name: str | None = None):
        self.num_sequences = num_sequences
        self._purpose = ("data",) if name is None else ("data", name)
        self.batch_size = batch_size
        self.seed = seed
        self._last = -1, np.empty(0, np.int64)
        """An epoch and its order, replaced together, since batches may be drawn in two threads."""

    def indices(self, step: int) -> np.ndarray:
        """Sequence indices of a step, (batch_size,) int64. Steps count from 0."""
        samples = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(samples, self.num_sequences)
        return np.concatenate(
            [self._epoch_order(epoch)[places[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
        )

    def rank_indices(self, step: int, rank: int, num_ranks: int) -> np.ndarray:
        """The contiguous part of `indices(step)` that belongs to a rank."""
        first, end = (self.batch_size * part // num_ranks for part in (rank, rank + 1))
        return self.indices(step)[first:end]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        last, order = self._last
        if epoch != last:
            order = generator(self.seed, *self._purpose, epoch).permutation(self.num_sequences)
            self._last = epoch, order
        return order


class MixedSampler(Sampler):
    """Draws from several sources in fixed shares, each in a new random order in every epoch of its own.

    Of every `SEQUENCES_PER_CYCLE` samples, each source gives a fixed number, in a random order. Which source a sample
    comes from, and which of its sequences it is, follow from the global index of the sample alone.

    Args:
        sizes: by name, the sequences of each source; their indices follow each other in this order.
        weights: by name, the weight of each source.
        batch_size: sequences per step, over all ranks.
        seed: determines the orders.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float], batch_size: int, seed: int):
        super().__init__(sum(sizes.values()), batch_size, seed)
        self.names = tuple(sizes)
        self._sizes = np.array([*sizes.values()])
        self._offsets = np.cumsum(self._sizes) - self._sizes
        self.per_cycle = apportioned([weights[name] for name in sizes], SEQUENCES_PER_CYCLE)
        """Sequences of each source in a cycle."""
        self._cycle = -1, np.empty(0, np.int64)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @override
    def indices(self, step: int) -> np.ndarray:
        samples = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        sources, ordinals = self._sources(samples)
        indices = np.empty_like(samples)
        for source in np.unique(sources):
            chosen = sources == source
            epochs, places = np.divmod(ordinals[chosen], self._sizes[source])
            indices[chosen] = self._offsets[source] + np.concatenate(
                [self._order(source, epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
            )
        return indices

    def drawn(self, steps: int) -> dict[str, int]:
        """By name, the sequences that the first `steps` steps draw from each source."""
        cycles, rest = divmod(steps * self.batch_size, SEQUENCES_PER_CYCLE)
        started = np.bincount(self._cycle_order(cycles)[:rest], minlength=len(self.names))
        return dict(zip(self.names, (cycles * self.per_cycle + started).tolist(), strict=True))

    def _sources(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample, and how many samples before it have the same source."""
        sources, ordinals = np.empty_like(samples), np.empty_like(samples)
        cycles, places = np.divmod(samples, SEQUENCES_PER_CYCLE)
        for cycle in np.unique(cycles):
            order, chosen = self._cycle_order(cycle), cycles == cycle
            before = np.empty_like(order)
            for source in range(len(self.names)):
                own = order == source
                before[own] = np.arange(cycle * self.per_cycle[source], (cycle + 1) * self.per_cycle[source])
            sources[chosen], ordinals[chosen] = order[places[chosen]], before[places[chosen]]
        return sources, ordinals

    def _cycle_order(self, cycle: int) -> np.ndarray:
        last, order = self._cycle
        if cycle != last:
            sources = np.repeat(np.arange(len(self.names)), self.per_cycle)
            order = generator(self.seed, "mixture", int(cycle)).permutation(sources)
            self._cycle = cycle, order
        return order

    def _order(self, source: int, epoch: int) -> np.ndarray:
        last, order = self._orders.get(source, (-1, np.empty(0, np.int64)))
        if epoch != last:
            order = generator(self.seed, "data", self.names[source], int(epoch)).permutation(self._sizes[source])
            self._orders[source] = epoch, order
        return order


def apportioned(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` divided in proportion to the weights, (len(weights),) int64: rounded down, the largest rests up."""
    exact = np.array(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[largest] += 1
    return counts
