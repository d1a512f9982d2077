"""Soft MoE: experts see weighted means of all tokens of a sequence (Puigcerver et al. 2024, arXiv 2308.00951)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, SoftRouting
from moeport.routers.base import Router, RouterConfig, unit


class SoftConfig(RouterConfig):
    """Every expert has slots, each a weighted mean of the tokens of a sequence; every token takes from all slots."""

    looks_ahead: ClassVar[bool] = True
    fixed_load: ClassVar[bool] = True
    even_load: ClassVar[bool] = True

    name: Literal["soft"] = "soft"
    """`soft`"""
    slots_per_expert: PositiveInt = 1
    """p: with S / num_experts slots, experts compute as many rows as a sequence has tokens S. Ours: 1, since the
    parameters have a row for each slot and so cannot follow the length of the sequence."""

    @property
    def experts_per_token(self) -> int:
        """1: every expert has a share in a token, but the rows are those of the slots; 1 is right at p = S / E."""
        return 1

    def assignments(self, num_tokens: int, num_experts: int, num_sequences: int) -> int:
        """Slots of all sequences."""
        return num_sequences * num_experts * self.slots_per_expert

    def parameter_count(self, d_model: int, num_experts: int) -> int:
        """A row for each slot, and the scale."""
        return d_model * num_experts * self.slots_per_expert + 1


class SoftRouter(Router[SoftConfig]):
    """z = scale * cos(x, mu), a logit for each token and slot; dispatch = softmax of z over the tokens of a sequence,
    combine = softmax of z over the slots.

    Slot r gets sum over tokens of dispatch * x, and a token sum over slots of combine * E_e(slot). mu (a row for each
    slot) and scale are trained; scale begins at 1. No token is dropped, and no choice is made.
    """

    paper = "From Sparse to Soft Mixtures of Experts, arXiv 2308.00951, section 2"
    load_balance = 0.0

    def parameter_specs(self) -> list[ParameterSpec]:
        """Slots mu, those of expert 0 first, and the scale."""
        slots = self.num_experts * self.config.slots_per_expert
        return [
            ParameterSpec("weight", (slots, self.d_model), std=self.init_std),
            ParameterSpec("scale", (1,), "ones"),
        ]

    def logits(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        """Scaled cosines, (T, R)."""
        kind = ops.dtype(x_TD)
        x_TD = unit(ops, ops.accurate(x_TD))
        mu_RD = unit(ops, ops.cast(params["weight"], ops.dtype(x_TD)))
        weight_RD = mu_RD * ops.cast(params["scale"], ops.dtype(x_TD))
        return self.product(ops, ops.cast(x_TD, kind) if self.in_compute_type else x_TD, weight_RD)

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> SoftRouting:
        """The shares of tokens in slots and of slots in tokens."""
        logits_TR = self.logits(ops, params, x_TD)
        logits_BSR = ops.reshape(logits_TR, (context.num_sequences, -1, logits_TR.shape[1]))
        dispatch_BRS = ops.softmax(ops.transpose(logits_BSR, (0, 2, 1)))
        return SoftRouting(
            dispatch_BSR=ops.transpose(dispatch_BRS, (0, 2, 1)),
            combine_BSR=ops.softmax(logits_BSR),
            num_experts=self.num_experts,
            logits_TE=logits_TR,
        )
