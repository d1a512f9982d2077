"""The Switch router (Fedus, Zoph and Shazeer 2021, arXiv 2101.03961)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import Router, RouterConfig, assign


class SwitchConfig(RouterConfig):
    """Top-1 of a softmax; the gate is the probability itself."""

    name: Literal["switch"] = "switch"
    """`switch`"""
    has_gate_rows: ClassVar[bool] = True
    gates_follow_probs: ClassVar[bool] = True

    @property
    def experts_per_token(self) -> int:
        """1."""
        return 1


class SwitchRouter(Router[SwitchConfig]):
    """Top-1: y = p_i(x) E_i(x) with i = argmax p(x), p = softmax(W x) (section 2.1, eq. 1 and 2 with k = 1)."""

    paper = "Switch Transformer, arXiv 2101.03961, section 2.1"

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The expert with the highest logit; ties go to the lower index."""
        logits_TE = self.logits(ops, params, x_TD)
        probs_TE = ops.softmax(logits_TE)
        expert_T1 = ops.topk_ids(logits_TE, 1)
        return assign(ops, expert_T1, ops.take_last(probs_TE, expert_T1), logits_TE, probs_TE, all_routed=True)
