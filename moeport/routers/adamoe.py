"""The AdaMoE router: top-k over true and null experts (Zeng et al. 2024, arXiv 2406.13233)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import PositiveInt
from typing_extensions import override

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import Router, TopKRouterConfig, assign


class AdaMoEConfig(TopKRouterConfig):
    """Top-k of a softmax over true experts and null experts, which compute nothing."""

    name: Literal["adamoe"] = "adamoe"
    """`adamoe`"""
    may_use_fewer: ClassVar[bool] = True
    has_gate_rows: ClassVar[bool] = True
    top_k: PositiveInt = 3
    """Choices per token K, among true and null experts; at most num_experts."""
    null_experts: PositiveInt = 8
    """Number of null experts, m. When balanced, a token uses K * num_experts / (num_experts + m) true experts."""

    @property
    @override
    def gates_sum_to_one(self) -> bool:
        return True

    def parameter_count(self, d_model: int, num_experts: int) -> int:
        """One row per expert, null experts included."""
        return d_model * (num_experts + self.null_experts)


class AdaMoERouter(Router[AdaMoEConfig]):
    """Top-k of p = softmax(W x) over n true experts and m null ones; the gates are p_e divided by
    the sum over the chosen true experts.

    A choice of a null expert is left unrouted. A token whose choices are all null experts passes through the residual
    connection alone. The load-balancing loss gives each null expert the mean share of all of them (eq. 6), since
    null experts are interchangeable.
    """

    paper = "AdaMoE, arXiv 2406.13233, eq. 6"

    def parameter_specs(self) -> list[ParameterSpec]:
        """Rows of the experts, then of the null experts."""
        rows = self.num_experts + self.config.null_experts
        return [ParameterSpec("weight", (rows, self.d_model), std=self.init_std)]

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The k true or null experts of highest logit."""
        logits_TE = self.logits(ops, params, x_TD)
        probs_TE = ops.softmax(logits_TE)
        expert_TK = ops.topk_ids(logits_TE, self.config.top_k)
        unrouted = ops.index(self.num_experts)
        true_TK = expert_TK < unrouted
        zero, one = ops.constant_like(0.0, probs_TE), ops.constant_like(1.0, probs_TE)
        weight_TK = ops.where(true_TK, ops.take_last(probs_TE, expert_TK), zero)
        total_T1 = ops.sum(weight_TK, axis=-1, keepdims=True)
        return assign(
            ops,
            ops.where(true_TK, expert_TK, unrouted),
            weight_TK / ops.where(total_T1 > zero, total_T1, one),
            logits_TE,
            probs_TE,
            null_experts=self.config.null_experts,
        )
