"""The DeepSeek-V3 router: sigmoid scores, group-limited top-k, balance by a bias (arXiv 2412.19437, 2408.15664)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import NonNegativeFloat, model_validator
from typing_extensions import override

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import Router, assign, normalized
from moeport.routers.groups import GroupLimitedConfig, inside_best_groups


class SigmoidBiasConfig(GroupLimitedConfig):
    """Sigmoid scores, selection by score + bias, gates from the scores alone."""

    name: Literal["sigmoid_bias"] = "sigmoid_bias"
    """`sigmoid_bias`"""
    single_gate: ClassVar[str] = "normalize_single_gate false"
    new_defaults: ClassVar[tuple[str, ...]] = ("normalize_single_gate",)
    has_gate_rows: ClassVar[bool] = True
    gates_follow_probs: ClassVar[bool] = True
    normalize_gates: bool = True
    """Divide the k gates by their sum. A single gate is not divided by itself, as in Megatron-LM and DeepSeek's
    code."""
    normalize_single_gate: bool = False
    """With top_k 1 and normalize_gates, divide the single gate too: it is 1, as in transformers, and only auxiliary
    losses train the router. Configs written by versions without this key, which give all other options, count as
    true."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """u: after each step, bias += u * sign(mean load - load)."""

    @model_validator(mode="after")
    def _single_gate_of_earlier_versions(self) -> Self:
        """Versions without the key divided every gate."""
        written = self.gives("top_k", "normalize_gates", "num_groups", "top_groups", "bias_update_rate")
        if written and not self.gives("normalize_single_gate") and self.top_k == 1 and self.normalize_gates:
            object.__setattr__(self, "normalize_single_gate", True)
        return self

    @property
    @override
    def gates_sum_to_one(self) -> bool:
        return self.normalize_gates and (self.top_k > 1 or self.normalize_single_gate)


class SigmoidBiasRouter(Router[SigmoidBiasConfig]):
    """s = sigmoid(W x); choose the top k of s + b within the best groups; gates s_i (DeepSeek-V3, eq. 12 to 16).

    The bias b is not trained by gradients: `update_state` moves it against the load, so no auxiliary loss is needed.
    One that is turned on counts the top k of s, without bias and groups (eq. 18).
    """

    paper = "DeepSeek-V3, arXiv 2412.19437, section 2.1.2; loss-free balancing, arXiv 2408.15664"
    load_balance = 0.0

    def parameter_specs(self) -> list[ParameterSpec]:
        """Gate weight and bias."""
        return [
            *super().parameter_specs(),
            ParameterSpec("bias", (self.num_experts,), "zeros", trainable=False),
        ]

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The k experts with the highest score + bias within the best groups."""
        logits_TE = self.logits(ops, params, x_TD)
        scores_TE = ops.sigmoid(logits_TE)
        selection_TE = ops.stop_gradient(scores_TE) + ops.cast(params["bias"], ops.dtype(scores_TE))
        if self.config.limits_groups:
            groups = self.config.num_groups, self.config.top_groups
            selection_TE = inside_best_groups(ops, selection_TE, *groups, best=2)
        expert_TK = ops.topk_ids(selection_TE, self.config.top_k)
        weight_TK = ops.take_last(scores_TE, expert_TK)
        if self.config.gates_sum_to_one:
            weight_TK = normalized(ops, weight_TK)
        routing = assign(ops, expert_TK, weight_TK, logits_TE, normalized(ops, scores_TE), all_routed=True)
        return replace(routing, balances_scores=True)

    def update_state(self, state: Mapping[str, np.ndarray], load_E: np.ndarray) -> dict[str, np.ndarray]:
        """bias += u * sign(mean load - load) (arXiv 2408.15664, Algorithm 1)."""
        step = np.sign(load_E.mean() - load_E).astype(np.float32) * np.float32(self.config.bias_update_rate)
        return {"bias": state["bias"] + step}
