"""Routers for benchmarks, whose load is known beforehand: forced balance, and a forced bias.

They serve as `debug.moe_force_load_balance` of torchtitan and `moe_router_force_biased` of Megatron-LM do; the latter
also replaces the scores by noise. Here they are computed and trained as in `topk`, so that a step does the work of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import NonNegativeFloat

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import ConfigT, Router, TopKRouterConfig, assign, normalized
from moeport.routers.tables import position


class ForcedBalanceConfig(TopKRouterConfig):
    """For benchmarks: experts in turn, whatever the scores, so that all have the same load."""

    name: Literal["forced_balance"] = "forced_balance"
    """`forced_balance`"""
    gates_follow_probs: ClassVar[bool] = True
    even_load: ClassVar[bool] = True


class ForcedBiasConfig(TopKRouterConfig):
    """For benchmarks: top-k of a softmax of scores plus a fixed random bias, so that the load is uneven."""

    name: Literal["forced_bias"] = "forced_bias"
    """`forced_bias`"""
    gates_follow_probs: ClassVar[bool] = True
    bias_std: NonNegativeFloat = 1.0
    """Standard deviation of the bias, which is drawn once per layer from the seed: the larger, the more uneven is the
    load."""


class _ForcedRouter(Router[ConfigT]):
    load_balance = 0.0

    def _routing(self, ops: Ops, expert_TK: Array, logits_TE: Array) -> Routing:
        """These choices, with the softmax of the logits as gates, divided by their sum if there are several."""
        probs_TE = ops.softmax(logits_TE)
        weight_TK = ops.take_last(probs_TE, expert_TK)
        if expert_TK.shape[1] > 1:
            weight_TK = normalized(ops, weight_TK)
        return assign(ops, expert_TK, weight_TK, logits_TE, probs_TE, all_routed=True)


class ForcedBalanceRouter(_ForcedRouter[ForcedBalanceConfig]):
    """Choice k of the token at position s of its text is expert (s K + k) mod E; gates from p = softmax(W x).

    All experts have the same load if E divides the sequence length times K; else their loads differ by at most one row
    per sequence. It depends on positions only, so it is the same for any number of ranks and micro-batches.
    """

    paper = "For benchmarks, as torchtitan's debug.moe_force_load_balance"

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """K experts in turn."""
        top_k = self.config.top_k
        first_T1 = ops.reshape(position(ops, context, x_TD.shape[0]) * ops.index(top_k), (-1, 1))
        expert_TK = (first_T1 + ops.reshape(ops.arange(top_k), (1, -1))) % ops.index(self.num_experts)
        return self._routing(ops, expert_TK, self.logits(ops, params, x_TD))


class ForcedBiasRouter(_ForcedRouter[ForcedBiasConfig]):
    """p = softmax(W x + b), top k of p; b is normal with mean 0, the same for all tokens and steps, and not trained."""

    paper = "For benchmarks, after Megatron-LM's moe_router_force_biased"

    def parameter_specs(self) -> list[ParameterSpec]:
        """Gate weight and bias."""
        bias = ParameterSpec("bias", (self.num_experts,), std=self.config.bias_std, trainable=False, fixed=True)
        return [*super().parameter_specs(), bias]

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The k experts with the highest score + bias."""
        logits_TE = self.logits(ops, params, x_TD)
        logits_TE = logits_TE + ops.cast(params["bias"], ops.dtype(logits_TE))
        return self._routing(ops, ops.topk_ids(logits_TE, self.config.top_k), logits_TE)
