"""Group-limited selection (DeepSeek-V2, arXiv 2405.04434, section 2.2.2): a token uses experts of a few groups only."""

from __future__ import annotations

import numpy as np
from pydantic import PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.routers.base import TopKRouterConfig


class GroupLimitedConfig(TopKRouterConfig):
    """A router that chooses within the best groups of consecutive experts."""

    num_groups: PositiveInt = 1
    """Groups of consecutive experts; must divide num_experts."""
    top_groups: PositiveInt = 1
    """Groups a token may use: those with the highest score of their best expert, or in sigmoid_bias those with the
    largest sum of their two best biased scores."""

    @property
    def limits_groups(self) -> bool:
        """Whether some groups are out of reach."""
        return self.top_groups < self.num_groups

    def problems(self, num_experts: int) -> list[tuple[str, str, str]]:
        """Groups must divide the experts and hold top_k of them."""
        found = super().problems(num_experts)
        usable = self.top_groups * num_experts // self.num_groups
        if num_experts % self.num_groups:
            found.append(
                (
                    "num_groups",
                    "does not divide the experts",
                    f"a divisor of model.moe.num_experts ({num_experts})",
                )
            )
        elif self.top_groups > self.num_groups:
            found.append(("top_groups", "more groups than there are", f"at most num_groups ({self.num_groups})"))
        elif usable < self.top_k <= num_experts:
            found.append(("top_k", "more experts per token than its groups hold", f"at most {usable}"))
        return found


def inside_best_groups(ops: Ops, score_TE: Array, num_groups: int, top_groups: int, best: int) -> Array:
    """Scores with minus infinity outside each token's best groups.

    Args:
        ops: the backend's operations.
        score_TE: scores to select by.
        num_groups: groups of consecutive experts.
        top_groups: groups that stay.
        best: a group's score is the sum of this many of its highest scores, or of all if it has fewer.

    Returns: (T, E).
    """
    experts = score_TE.shape[1]
    grouped = ops.reshape(score_TE, (-1, num_groups, experts // num_groups))
    highest = ops.take_last(grouped, ops.topk_ids(grouped, min(best, experts // num_groups)))
    chosen = ops.topk_ids(ops.sum(highest, axis=-1), top_groups)
    allowed = ops.sum(ops.one_hot(chosen, num_groups, ops.dtype(score_TE)), axis=1)
    half, outside = ops.constant_like(0.5, score_TE), ops.constant_like(-np.inf, score_TE)
    kept = ops.where(ops.reshape(allowed, (-1, num_groups, 1)) > half, grouped, outside)
    return ops.reshape(kept, (-1, experts))
