"""Which sequences a step trains on: a pure function of the seed and the step."""

from __future__ import annotations

import numpy as np

from moeport.core.parameters import generator


class Sampler:
    """Visits all sequences in a new random order every epoch.

    Sample j of step s has the global index g = s * batch_size + j, and is entry g mod num_sequences in the order of
    epoch g // num_sequences; a batch may span two epochs. To resume at a step, ask for that step.

    Args:
        num_sequences: sequences per epoch, at least 1.
        batch_size: sequences per step, over all ranks.
        seed: determines the orders.
    """

    def __init__(self, num_sequences: int, batch_size: int, seed: int):
        self.num_sequences = num_sequences
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
            order = generator(self.seed, "data", epoch).permutation(self.num_sequences)
            self._last = epoch, order
        return order
