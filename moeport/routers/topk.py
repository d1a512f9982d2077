"""The plain top-k router of Mixtral, Qwen3-MoE, OLMoE and most open models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from typing_extensions import override

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import assign, normalized
from moeport.routers.groups import GroupLimitedConfig, inside_best_groups
from moeport.routers.noise import LogitNoiseConfig, LogitNoiseRouter


class TopKConfig(GroupLimitedConfig, LogitNoiseConfig):
    """Top-k of a softmax."""

    name: Literal["topk"] = "topk"
    """`topk`"""
    single_gate: ClassVar[str] = "softmax before and normalize_gates false"
    has_gate_rows: ClassVar[bool] = True
    gates_follow_probs: ClassVar[bool] = True
    softmax: Literal["before", "after"] = "before"
    """`before`: softmax over all experts, then top-k. `after`: softmax over the k chosen logits."""
    normalize_gates: bool = True
    """With `softmax: before`, divide the k gates by their sum. (With `after` they already sum to 1.)"""

    @property
    @override
    def gates_sum_to_one(self) -> bool:
        return self.softmax == "after" or self.normalize_gates


class TopKRouter(LogitNoiseRouter[TopKConfig]):
    """Softmax gates over the k best experts (Shazeer et al. 2017, eq. 3 to 5, by default without noise)."""

    paper = (
        "Sparsely-Gated MoE, arXiv 1701.06538, section 2.1; Mixtral, arXiv 2401.04088, section 2.1; groups: "
        "DeepSeek-V2, arXiv 2405.04434, section 2.2.2"
    )

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The k experts with the highest logits, within the groups with the highest one."""
        logits_TE = self.noisy_logits(ops, params, x_TD, context)
        probs_TE = ops.softmax(logits_TE)
        selection_TE = logits_TE
        if self.config.limits_groups:
            groups = self.config.num_groups, self.config.top_groups
            selection_TE = inside_best_groups(ops, ops.stop_gradient(logits_TE), *groups, best=1)
        expert_TK = ops.topk_ids(selection_TE, self.config.top_k)
        if self.config.softmax == "after":
            weight_TK = ops.softmax(ops.take_last(logits_TE, expert_TK))
        else:
            weight_TK = ops.take_last(probs_TE, expert_TK)
            if self.config.normalize_gates:
                weight_TK = normalized(ops, weight_TK)
        return assign(ops, expert_TK, weight_TK, logits_TE, probs_TE, all_routed=True)
