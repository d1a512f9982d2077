"""The GShard router: top-2 with a random second expert (Lepikhin et al. 2020, arXiv 2006.16668)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import Router, RouterConfig, assign, normalized


class GShardConfig(RouterConfig):
    """Top-2 in which the second expert is kept at random, in proportion to its gate."""

    name: Literal["gshard"] = "gshard"
    """`gshard`"""
    has_gate_rows: ClassVar[bool] = True
    random_second: bool = True
    """In training, keep the second expert with probability min(1, 2 g2); if false, always keep it."""

    @property
    def experts_per_token(self) -> int:
        """2."""
        return 2

    def problems(self, num_experts: int) -> list[tuple[str, str, str]]:
        """There must be at least two experts."""
        found = super().problems(num_experts)
        if num_experts < 2:
            found.append(("name", "gshard sends each token to 2 experts", "model.moe.num_experts of at least 2"))
        return found


class GShardRouter(Router[GShardConfig]):
    """Top-2 gates g1 and g2, normalised to sum to 1; the second expert is served with probability 2 g2 (Algorithm 1).

    The load-balancing loss counts first choices only, as in the paper. When the second expert is not served, the
    first keeps its gate g1 < 1.
    """

    paper = "GShard, arXiv 2006.16668, section 2.2, Algorithm 1"
    noise = ("second_expert",)

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The two experts with the highest logits."""
        logits_TE = self.logits(ops, params, x_TD)
        probs_TE = ops.softmax(logits_TE)
        expert_T2 = ops.topk_ids(logits_TE, 2)
        weight_T2 = normalized(ops, ops.take_last(probs_TE, expert_T2))
        may_decline = self.config.random_second and context.training
        if may_decline:
            noise_T = ops.cast(context.noise["second_expert"], ops.dtype(weight_T2))
            served_T = ops.constant_like(2.0, weight_T2) * ops.stop_gradient(weight_T2[:, 1]) > noise_T
            served_T1 = ops.reshape(served_T, (-1, 1))
            expert_T2 = ops.concat(
                (expert_T2[:, :1], ops.where(served_T1, expert_T2[:, 1:], ops.index(self.num_experts))),
                axis=1,
            )
            weight_T2 = ops.concat(
                (weight_T2[:, :1], ops.where(served_T1, weight_T2[:, 1:], ops.constant_like(0.0, weight_T2))),
                axis=1,
            )
        return assign(ops, expert_T2, weight_T2, logits_TE, probs_TE, balanced_choices=1, all_routed=not may_decline)
