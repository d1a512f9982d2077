"""CartesianMoE: two mixture layers in sequence; each pair of their experts is a composite expert (arXiv 2410.16077)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from typing_extensions import override

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import Router, TopKRouterConfig, assign, normalized


class CartesianConfig(TopKRouterConfig):
    """Two sub-layers of num_experts sub-experts each, both with a top-k softmax router."""

    name: Literal["cartesian"] = "cartesian"
    """`cartesian`"""
    has_gate_rows: ClassVar[bool] = True
    gates_follow_probs: ClassVar[bool] = True
    sub_layers: ClassVar[int] = 2
    mixes_shared_experts: ClassVar[bool] = True

    @property
    @override
    def gates_sum_to_one(self) -> bool:
        return True


class CartesianRouter(Router[CartesianConfig]):
    """In each sub-layer p = softmax(W x); the k best sub-experts are chosen, with gates p divided by their sum.

    x becomes x + A(norm(x)), then x + B(norm'(x)); A and B each have a router, sub-experts and shared experts, so
    that E sub-experts in each make E^2 composite experts. A learned two-way softmax mixes shared and routed experts;
    that it has no bias is our choice. `expert_hidden` is the width of a sub-expert, in the paper half that of a full
    expert.
    """

    paper = "CartesianMoE, arXiv 2410.16077, and the authors' released model code"

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The k sub-experts of highest logit."""
        logits_TE = self.logits(ops, params, x_TD)
        probs_TE = ops.softmax(logits_TE)
        expert_TK = ops.topk_ids(logits_TE, self.config.top_k)
        weight_TK = normalized(ops, ops.take_last(probs_TE, expert_TK))
        return assign(ops, expert_TK, weight_TK, logits_TE, probs_TE, all_routed=True)
