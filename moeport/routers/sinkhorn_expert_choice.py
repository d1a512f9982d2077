"""Sinkhorn expert choice (Liu et al. 2024, Routers in Vision Mixture of Experts, arXiv 2401.15969)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.routers.expert_choice import ExpertsChooseConfig, ExpertsChooseRouter
from moeport.routers.sinkhorn import sinkhorn_log_plan


class SinkhornExpertChoiceConfig(ExpertsChooseConfig):
    """Each expert takes the tokens with the largest shares in an optimal transport plan; softmax gates."""

    name: Literal["sinkhorn_expert_choice"] = "sinkhorn_expert_choice"
    """`sinkhorn_expert_choice`"""
    sinkhorn_iterations: PositiveInt = 20
    """Each makes the rows of the plan sum to 1, then its columns to S / num_experts."""


class SinkhornExpertChoiceRouter(ExpertsChooseRouter[SinkhornExpertChoiceConfig]):
    """Expert e takes the C tokens of a group with the largest share of column e of the plan; gates softmax(W x)_e.

    The plan is that of `sinkhorn_token_choice`, over the tokens of a group: it gives each token a mass of 1, so that a
    token which no expert prefers is less often left out than in `expert_choice`. It needs no gradient.
    """

    paper = "Routers in Vision Mixture of Experts, arXiv 2401.15969, Sinkhorn expert choice"

    def scores(self, ops: Ops, logits_GSE: Array, probs_GSE: Array) -> Array:
        """Logarithm of the plan."""
        log_plan = sinkhorn_log_plan(ops, logits_GSE, self.config.sinkhorn_iterations)
        return ops.transpose(log_plan, (0, 2, 1))
