"""Sinkhorn token choice (Liu et al. 2024, Routers in Vision Mixture of Experts, arXiv 2401.15969)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import TopKRouterConfig, assign
from moeport.routers.noise import LogitNoiseConfig, LogitNoiseRouter


class SinkhornTokenChoiceConfig(TopKRouterConfig, LogitNoiseConfig):
    """In training, top-k of an optimal transport plan that spreads the tokens evenly; softmax gates."""

    name: Literal["sinkhorn_token_choice"] = "sinkhorn_token_choice"
    """`sinkhorn_token_choice`"""
    has_gate_rows: ClassVar[bool] = True
    gates_follow_probs: ClassVar[bool] = True
    sinkhorn_iterations: PositiveInt = 20
    """Each makes the rows of the plan sum to 1, then its columns to T / num_experts."""


class SinkhornTokenChoiceRouter(LogitNoiseRouter[SinkhornTokenChoiceConfig]):
    """Top-k of each token's row of the plan; the gates are softmax(W x), not normalised over the k.

    The plan is the entropy-regularised optimal transport with scores W x, epsilon = 1, a mass of 1 per token and T / E
    per expert. It needs no gradient and no load-balancing loss. In evaluation and generation the choice is the top-k of
    W x, so that no token depends on others; that is ours for this paper, and what Megatron-LM does.
    """

    paper = "Routers in Vision Mixture of Experts, arXiv 2401.15969, Sinkhorn token choice"
    load_balance = 0.0

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The k experts with the largest share of the plan, or outside training of highest logit."""
        logits_TE = self.noisy_logits(ops, params, x_TD, context)
        probs_TE = ops.softmax(logits_TE)
        scores_TE = logits_TE
        if context.training:
            scores_TE = sinkhorn_log_plan(ops, logits_TE, self.config.sinkhorn_iterations)
        expert_TK = ops.topk_ids(scores_TE, self.config.top_k)
        return assign(ops, expert_TK, ops.take_last(probs_TE, expert_TK), logits_TE, probs_TE, all_routed=True)


def sinkhorn_log_plan(ops: Ops, logits_SE: Array, iterations: int) -> Array:
    """Logarithm of diag(a) exp(logits) diag(b) with rows that sum to 1 and columns that sum to S / E, without gradient.

    Columns come last and are exact; rows are as near to 1 as the iterations bring them.

    Args:
        ops: the backend's operations.
        logits_SE: scores (..., S, E), a plan for each of the leading dimensions.
        iterations: each makes the rows right, then the columns.
    """
    log_plan = ops.stop_gradient(logits_SE)
    *groups, tokens, experts = log_plan.shape
    swapped = (*range(len(groups)), len(groups) + 1, len(groups))
    # The logarithm of an array: a number would be part of a compiled graph, which would then hold for one S only.
    log_share = ops.log(ops.zeros((), ops.dtype(log_plan)) + ops.constant_like(tokens / experts, log_plan))
    for _ in range(iterations):
        log_plan = log_plan - ops.reshape(ops.logsumexp(log_plan), (*groups, tokens, 1))
        columns_E = ops.logsumexp(ops.transpose(log_plan, swapped))
        log_plan = log_plan + ops.reshape(log_share - columns_E, (*groups, 1, experts))
    return log_plan
