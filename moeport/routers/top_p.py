"""The top-p router: the experts that make up a share of the probability (Huang et al. 2024, arXiv 2403.07652)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import Router, TopKRouterConfig, assign, sum_of_better


class TopPConfig(TopKRouterConfig):
    """Experts in descending order of probability until their sum reaches a threshold."""

    name: Literal["top_p"] = "top_p"
    """`top_p`"""
    may_use_fewer: ClassVar[bool] = True
    has_gate_rows: ClassVar[bool] = True
    top_k: PositiveInt = 4
    """Maximum number of experts per token K; at most num_experts. Ours: the paper sets no limit."""
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """p: the sum of probabilities at which a token has enough experts; the expert that reaches it is included."""
    entropy_coefficient: NonNegativeFloat = 1e-4
    """Weight of each layer's routing entropy in the training loss, which keeps the number of experts low. The default
    is ours."""


class TopPRouter(Router[TopPConfig]):
    """The smallest k with p_1 + .. + p_k >= threshold for descending p = softmax(W x); the gates are the p.

    Of a token's K choices, those beyond the threshold are unrouted. The router's own loss is the mean entropy of p,
    which the paper calls the dynamic loss: without it, flat probabilities would cost nothing and need many experts.
    """

    paper = "Harder Tasks Need More Experts, arXiv 2403.07652, dynamic routing and dynamic loss"

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The experts with the highest logits, up to the threshold and at most K."""
        logits_TE = self.logits(ops, params, x_TD)
        probs_TE = ops.softmax(logits_TE)
        expert_TK = ops.topk_ids(logits_TE, self.config.top_k)
        weight_TK = ops.take_last(probs_TE, expert_TK)
        needed_TK = sum_of_better(ops, weight_TK) < ops.constant_like(self.config.threshold, weight_TK)
        own_loss = None
        if self.config.entropy_coefficient:
            entropy_T = ops.logsumexp(logits_TE) - ops.sum(probs_TE * logits_TE, axis=-1)
            own_loss = ops.mean(entropy_T) * ops.constant_like(self.config.entropy_coefficient, entropy_T)
        return assign(
            ops,
            ops.where(needed_TK, expert_TK, ops.index(self.num_experts)),
            ops.where(needed_TK, weight_TK, ops.constant_like(0.0, weight_TK)),
            logits_TE,
            probs_TE,
            own_loss=own_loss,
        )
