"""Chooses the rows per expert in a graph of fixed shapes, so that no token is lost."""

from __future__ import annotations

import math

from moeport.config.model import MoEConfig

GROWTH = 1.25
"""Ratio of each size to the previous one; padding stays below a quarter of the busiest expert's rows."""
PATIENCE = 100
"""Number of consecutive batches that must fit into a smaller size before it is used."""


class ExpertRows:
    """Chooses the rows per expert from a short list of sizes, each of which is compiled at most once.

    A batch is run at the current size. The loads returned with its loss show whether an expert had more rows; if so,
    the result is discarded and the batch runs again at the next size that holds them. The result is exact, at the cost
    of a second run and, the first time, of a compilation. In steady state neither happens.

    Args:
        config: the `model.moe` section. With a capacity, the size is what its factor gives, the most that any policy
            allows, and never changes; nor does it if every expert always computes the same number of rows.
        assignments: assignments of one batch, including unrouted ones.
        training: whether the batch is trained on, in which case capacity policy `round` fills rows.
    """

    def __init__(self, config: MoEConfig, assignments: int, training: bool = False):
        experts = config.num_experts
        self.tile = config.capacity.tile if training and config.capacity.policy == "round" else 1
        self.sizes = _sizes(assignments, experts)
        if config.capacity.has_limit:
            self.sizes = [min(assignments, math.ceil(config.capacity.factor * assignments / experts))]
        if config.router.fixed_load:
            self.sizes = [assignments // experts]
        self.size = next((size for size in self.sizes if size * experts >= 2 * assignments), self.sizes[-1])
        self._recent = 0
        self._batches = 0

    def fits(self, served: int) -> bool:
        """Record the busiest expert's load; False if the batch must run again, at a larger size.

        Args:
            served: the most choices of tokens that an expert served; those that were rounded up are filled to a tile.
        """
        busiest = min(math.ceil(served / self.tile) * self.tile, self.sizes[-1])
        if busiest > self.size:
            self.size = self._smallest_size(busiest)
            self._recent = self._batches = 0
            return False
        self._recent = max(self._recent, busiest)
        self._batches += 1
        if self._batches == PATIENCE:
            self.size = self._smallest_size(self._recent)
            self._recent = self._batches = 0
        return True

    def _smallest_size(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)


def _sizes(assignments: int, experts: int) -> list[int]:
    """Multiples of 8 from the mean load up to all assignments, each at least GROWTH times the previous one."""
    sizes = []
    size = math.ceil(assignments / experts)
    while size < assignments:
        sizes.append(min(assignments, math.ceil(size / 8) * 8))
        size = max(sizes[-1] + 8, math.ceil(sizes[-1] * GROWTH))
    return [*sizes, assignments] if not sizes or sizes[-1] < assignments else sizes
