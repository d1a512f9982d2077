"""MaskMoE: each vocabulary id sees only some of the experts (Su et al. 2024, arXiv 2407.09816)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt
from typing_extensions import override

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import TopKRouterConfig, assign, normalized
from moeport.routers.tables import TableRouter, balanced_table, ids_of


class MaskMoEConfig(TopKRouterConfig):
    """Top-k of a softmax over the experts visible to a token's vocabulary id: one for rare ids, more for others."""

    name: Literal["maskmoe"] = "maskmoe"
    """`maskmoe`"""
    may_use_fewer: ClassVar[bool] = True
    has_gate_rows: ClassVar[bool] = True
    needs_token_ids: ClassVar[bool] = True
    visible_infrequent: PositiveInt = 1
    """Experts that an infrequent id sees; at most num_experts. The paper uses 1."""
    visible_frequent: PositiveInt | None = None
    """Experts that a frequent id sees; at most num_experts, the default. Ours: the paper's value is unknown."""
    frequent_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.8
    """The frequent ids are the smallest set that makes up this share of the training set. Ours: the paper's value is
    unknown."""

    @property
    @override
    def gates_sum_to_one(self) -> bool:
        return True

    @override
    def warnings(self, num_experts: int) -> list[tuple[str, str, str]]:
        if self.visible_infrequent == self.visible_frequent == 1:
            return []  # fixed routing, as in Hash Layers: there is no choice to train
        return super().warnings(num_experts)

    def problems(self, num_experts: int) -> list[tuple[str, str, str]]:
        """No id can choose or see more experts than there are."""
        found = super().problems(num_experts)
        for option in ("visible_infrequent", "visible_frequent"):
            if (getattr(self, option) or 1) > num_experts:
                most = f"at most model.moe.num_experts ({num_experts})"
                found.append((option, "more visible experts than there are", most))
        return found


class MaskMoERouter(TableRouter[MaskMoEConfig]):
    """p = softmax(W x + mask[layer][id]), mask 0 for visible experts and -infinity for others; gates p divided
    by their sum.

    An id that sees V < K experts uses V of them; its other choices are unrouted. So V = 1 for all ids gives each a
    fixed expert with gate 1, as in Hash Layers, and V = E is `topk`. The mask is drawn before training: in descending
    order of frequency, each id sees the experts with the fewest tokens so far, separately for frequent and infrequent
    ids. This balancing is ours; the paper draws uniformly. Masked experts have p = 0 in the load-balancing
    loss; the router z-loss uses the logits of all experts.
    """

    paper = "MaskMoE, arXiv 2407.09816"

    def parameter_specs(self) -> list[ParameterSpec]:
        """Gate weight, and a table (V, E) with 1 for experts that the id sees and 0 for others."""
        return [*super().parameter_specs(), self.table("visible", self.num_experts, self._drawn)]

    def _drawn(self, random: np.random.Generator, counts_V: np.ndarray) -> np.ndarray:
        config, experts = self.config, self.num_experts
        frequent_V = most_frequent(counts_V, config.frequent_share)
        visible_VE = np.zeros((len(counts_V), experts))
        kinds = ((~frequent_V, config.visible_infrequent), (frequent_V, config.visible_frequent or experts))
        for chosen_V, number in kinds:
            table = balanced_table(random, counts_V[chosen_V], experts, number)
            visible_VE[np.flatnonzero(chosen_V)[:, None], table] = 1
        return visible_VE

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The k visible experts with the highest logits."""
        logits_TE = self.logits(ops, params, x_TD)
        half, zero = ops.constant_like(0.5, logits_TE), ops.constant_like(0.0, logits_TE)
        visible_TE = ops.cast(ops.take_rows(params["visible"], ids_of(context)), ops.dtype(logits_TE))
        masked_TE = ops.where(visible_TE > half, logits_TE, ops.constant_like(-np.inf, logits_TE))
        probs_TE = ops.softmax(masked_TE)
        expert_TK = ops.topk_ids(masked_TE, self.config.top_k)
        seen_TK = ops.take_last(visible_TE, expert_TK) > half
        return assign(
            ops,
            ops.where(seen_TK, expert_TK, ops.index(self.num_experts)),
            normalized(ops, ops.where(seen_TK, ops.take_last(probs_TE, expert_TK), zero)),
            logits_TE,
            probs_TE,
        )


def most_frequent(counts_V: np.ndarray, share: float) -> np.ndarray:
    """Which ids are frequent, (V,) bool: the smallest set whose counts make up the share; ties go to the lower id."""
    order_V = np.argsort(-counts_V, kind="stable")
    before_V = np.cumsum(counts_V[order_V]) - counts_V[order_V]
    frequent_V = np.zeros(len(counts_V), bool)
    frequent_V[order_V] = before_V < share * counts_V.sum()
    return frequent_V
