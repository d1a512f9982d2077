"""Hash Layers: a fixed expert for each vocabulary id (Roller et al. 2021, arXiv 2106.04426)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing
from moeport.routers.base import TopKRouterConfig
from moeport.routers.tables import TableRouter, TableRouterConfig, balanced_table, experts_at, fixed_routing, ids_of


class HashConfig(TableRouterConfig, TopKRouterConfig):
    """A fixed expert for each vocabulary id, drawn so that all experts get the same number of tokens."""

    name: Literal["hash"] = "hash"
    """`hash`"""
    top_k: PositiveInt = 1
    """Experts per id K, each with gate 1 / K; at most num_experts. The paper uses 1; 2 gives the hash baseline of
    CartesianMoE, where equal gates are our choice."""

    @property
    def experts_per_token(self) -> int:
        """K."""
        return self.top_k


class HashRouter(TableRouter[HashConfig]):
    """The expert of a token is table[layer][id], with gate 1. Nothing is trained.

    The table is the paper's balanced assignment, built from the token counts of the training set: ids in descending
    order of frequency, each to the expert with the fewest tokens so far. Each layer has its own table.
    """

    paper = "Hash Layers For Large Sparse Models, arXiv 2106.04426, balanced assignment"
    load_balance = 0.0

    def parameter_specs(self) -> list[ParameterSpec]:
        """The table (V, K)."""
        return [self.table("experts", self.config.top_k, self._drawn)]

    def _drawn(self, random: np.random.Generator, counts_V: np.ndarray) -> np.ndarray:
        return balanced_table(random, counts_V, self.num_experts, self.config.top_k)

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The experts in the table."""
        expert_TK = experts_at(ops, params["experts"], ids_of(context), self.num_experts)
        return fixed_routing(ops, expert_TK, self.num_experts, x_TD)
