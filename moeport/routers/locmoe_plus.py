"""The router of LocMoE+, or Expert-Token Resonance (Li et al. 2024, arXiv 2406.00023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import TopKRouterConfig, assign, normalized, sum_of_better
from moeport.routers.grap import GrAPConfig, GrAPRouter


class LocMoEPlusConfig(GrAPConfig, TopKRouterConfig):
    """The experts nearest in direction, until their affinities sum to a threshold; use it with drop policy affinity."""

    name: Literal["locmoe_plus"] = "locmoe_plus"
    """`locmoe_plus`"""
    may_use_fewer: ClassVar[bool] = True
    top_k: PositiveInt = 2
    """Maximum number of experts per token K; at most num_experts. Ours: the paper gives no number."""
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Sum of affinities, as softmax shares, at which a token has enough experts; the expert that reaches it is
    included. Ours: the paper gives neither a value nor a rule for summing negative cosines."""
    gates: Literal["softmax", "normalized", "cosine"] = "softmax"
    """What scales an expert's output. `softmax`: its share of the softmax over all experts. `normalized`: that share
    divided by the sum of the token's shares. `cosine`: the affinity itself, which may be negative. Ours: the paper
    does not say."""


class LocMoEPlusRouter(GrAPRouter[LocMoEPlusConfig]):
    """Token choice by delta_te = cos(x_t, w_e) with the fixed gate w, then expert choice by the same affinity.

    A token takes the smallest set of best experts whose p sum to the threshold, p = softmax(sqrt(D) delta /
    temperature). The expert's choice among the tokens that chose it is the drop policy `affinity`, which keeps those
    with the highest delta. The paper's equation 6 prints the lowest; its text says highest, and so do we. The losses
    are those of LocMoE.
    """

    paper = "Expert-Token Resonance MoE (LocMoE+ in its first version), arXiv 2406.00023"

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The experts with the highest cosines, up to the threshold and at most K."""
        config = self.config
        cosine_TE = self.gate_cosines(ops, params, x_TD)
        logits_TE = cosine_TE * ops.constant_like(math.sqrt(self.d_model) / config.temperature, cosine_TE)
        probs_TE = ops.softmax(logits_TE)
        expert_TK = ops.topk_ids(cosine_TE, config.top_k)
        cosine_TK, share_TK = ops.take_last(cosine_TE, expert_TK), ops.take_last(probs_TE, expert_TK)
        needed_TK = sum_of_better(ops, share_TK) < ops.constant_like(config.threshold, share_TK)
        weight_TK = cosine_TK if config.gates == "cosine" else share_TK
        weight_TK = ops.where(needed_TK, weight_TK, ops.constant_like(0.0, weight_TK))
        return assign(
            ops,
            ops.where(needed_TK, expert_TK, ops.index(self.num_experts)),
            normalized(ops, weight_TK) if config.gates == "normalized" else weight_TK,
            logits_TE,
            probs_TE,
            own_loss=self.locality_loss(ops, probs_TE, context.topology),
            affinity_TK=cosine_TK,
        )
