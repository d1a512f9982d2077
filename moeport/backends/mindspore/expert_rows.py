"""How many rows an expert gets in a graph of fixed shapes, so that no token is lost."""

from __future__ import annotations

import math

from moeport.config.model import MoEConfig

GROWTH = 1.25
"""Ratio of one size to the next; padding stays below a quarter of the busiest expert's rows."""
PATIENCE = 100
"""Batches that must all fit into a smaller size before it is used."""


class ExpertRows:
    """Chooses the rows an expert from a short list of sizes, each of which is compiled at most once.

    A batch is run at the present size. The loads that come out with its loss show whether an expert had more rows; then
    the result is thrown away and the batch runs again at the next size that holds them: exact, at the price of a second
    run and, the first time, of a compilation. In steady state neither happens.

    Args:
        config: the `model.moe` section; with a capacity the size is what its factor gives, the most that
            a policy allows, and never changes; nor does it where every expert computes the same number of rows.
        assignments: rows of one batch, those sent nowhere included.
    """

    def __init__(self, config: MoEConfig, assignments: int):
        experts = config.num_experts
        self.sizes = _sizes(assignments, experts)
        if config.capacity.policy != "dropless":
            self.sizes = [min(assignments, math.ceil(config.capacity.factor * assignments / experts))]
        if config.router.fixed_load:
            self.sizes = [assignments // experts]
        self.size = next((size for size in self.sizes if size * experts >= 2 * assignments), self.sizes[-1])
        self._recent = 0
        self._batches = 0

    def fits(self, busiest: int) -> bool:
        """Take note of the rows of the busiest expert; False if the batch must run again, at a larger size."""
        if busiest > self.size:
            self.size = self._holding(busiest)
            self._recent = self._batches = 0
            return False
        self._recent = max(self._recent, busiest)
        self._batches += 1
        if self._batches == PATIENCE:
            self.size = self._holding(self._recent)
            self._recent = self._batches = 0
        return True

    def _holding(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)


def _sizes(assignments: int, experts: int) -> list[int]:
    """Multiples of 8 from the mean load to all assignments, each at least GROWTH times the one before."""
    sizes = []
    size = math.ceil(assignments / experts)
    while size < assignments:
        sizes.append(min(assignments, math.ceil(size / 8) * 8))
        size = max(sizes[-1] + 8, math.ceil(sizes[-1] * GROWTH))
    return [*sizes, assignments] if not sizes or sizes[-1] < assignments else sizes
