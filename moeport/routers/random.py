"""THOR: random experts, and two passes that should agree (Zuo et al. 2021, arXiv 2110.04260)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import NonNegativeFloat

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing
from moeport.routers.tables import (
    TableRouter,
    TableRouterConfig,
    experts_at,
    first_ids,
    fixed_routing,
    ids_of,
    position,
    random_table,
)


class RandomConfig(TableRouterConfig):
    """In training, one random expert for a whole micro-batch, in two passes with outputs that should agree."""

    name: Literal["random"] = "random"
    """`random`"""
    passes: ClassVar[int] = 2
    consistency: NonNegativeFloat = 5.0
    """alpha: weight of the divergence between the outputs of the two passes. The default comes from the authors'
    training script."""
    inference: Literal["token", "sequence"] = "token"
    """Outside training, whether an expert is drawn per token or per sequence."""

    @property
    def consistency_weight(self) -> float:
        """alpha."""
        return self.consistency


class RandomRouter(TableRouter[RandomConfig]):
    """Each layer sends all tokens of a micro-batch to one expert, drawn anew in each pass; gate 1. Nothing is trained.

    The loss is CE_1 + CE_2 + alpha (KL(p_1, p_2) + KL(p_2, p_1)) / 2. As in the authors' released code, the two
    passes draw independently, so a layer may draw the same expert twice.

    Outside training the draw is repeatable, which is our choice: a table of random experts is looked up at id +
    position for each token, or at the id of the first token for each sequence.
    """

    paper = "THOR: Taming Sparsely Activated Transformer with Stochastic Experts, arXiv 2110.04260"
    noise = ("pass1", "pass2")
    load_balance = 0.0

    def parameter_specs(self) -> list[ParameterSpec]:
        """The table (V, 1) used outside training."""
        return [self.table("experts", 1, self._drawn)]

    def _drawn(self, random: np.random.Generator, counts_V: np.ndarray) -> np.ndarray:
        return random_table(random, counts_V, self.num_experts)

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """In training, one expert for all tokens, by the first token's number; otherwise looked up in the table."""
        table_V1, tokens = params["experts"], x_TD.shape[0]
        if context.training:
            drawn_1 = context.noise[f"pass{context.pass_number + 1}"][:1]
            expert_T1 = ops.reshape(ops.arange(tokens) * ops.index(0), (-1, 1)) + self._expert(ops, drawn_1)
        else:
            if self.config.inference == "sequence":
                key_T = first_ids(ops, context, tokens)
            else:
                key_T = (ids_of(context) + position(ops, context, tokens)) % ops.index(table_V1.shape[0])
            expert_T1 = experts_at(ops, table_V1, key_T, self.num_experts)
        return fixed_routing(ops, expert_T1, self.num_experts, x_TD)

    def _expert(self, ops: Ops, uniform_1: Array) -> Array:
        """floor(E u), (1, 1): the largest index that does not exceed E u."""
        index_E = ops.cast(ops.arange(self.num_experts), ops.dtype(uniform_1))
        below_E = index_E <= uniform_1 * ops.constant_like(float(self.num_experts), uniform_1)
        return ops.topk_ids(ops.reshape(ops.where(below_E, index_E, -index_E), (1, -1)), 1)
