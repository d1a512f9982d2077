"""Random Routed Experts of PanGu-Sigma: a group for the domain, a random expert in it for the id (arXiv 2303.10845)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing
from moeport.routers.tables import (
    TableRouter,
    TableRouterConfig,
    domains,
    experts_at,
    first_ids,
    fixed_routing,
    ids_of,
    random_table,
)


class RREConfig(TableRouterConfig):
    """A group of experts for each domain and a random, fixed expert of the group for each vocabulary id."""

    name: Literal["rre"] = "rre"
    """`rre`"""
    groups: PositiveInt = 1
    """Groups of experts; must divide num_experts. 1 means no domains."""
    group_by: Literal["first_token", "domain"] = "first_token"
    """What decides the group of a sequence. `first_token`: the id of its first token, modulo groups, which is ours for
    text without labels. `domain`: its place in data.domains, modulo groups; the first group where that is not known, as
    in generation."""

    def problems(self, num_experts: int) -> list[tuple[str, str, str]]:
        """groups must divide num_experts."""
        found = super().problems(num_experts)
        if num_experts % self.groups:
            expected = f"a divisor of model.moe.num_experts ({num_experts})"
            found.append(("groups", "does not divide the experts", expected))
        return found


class RRERouter(TableRouter[RREConfig]):
    """Expert domain * E / groups + table[layer][id], gate 1. The table is uniform over E / groups; nothing is trained.

    Text without `data.domains` can carry its label as the first token of each sequence. The table ignores token
    frequencies, which is ours: the paper does not say how its table is made.
    """

    paper = "PanGu-Sigma, arXiv 2303.10845, Random Routed Experts, as LocMoE, arXiv 2401.13920, describes them"
    load_balance = 0.0

    def parameter_specs(self) -> list[ParameterSpec]:
        """The table (V, 1) of positions within a group."""
        return [self.table("experts", 1, self._drawn)]

    def _drawn(self, random: np.random.Generator, counts_V: np.ndarray) -> np.ndarray:
        return random_table(random, counts_V, self.num_experts // self.config.groups)

    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        """The expert from the table, within the group of the sequence."""
        size = self.num_experts // self.config.groups
        place_T1 = experts_at(ops, params["experts"], ids_of(context), size)
        found = domains if self.config.group_by == "domain" else first_ids
        group_T = found(ops, context, x_TD.shape[0]) % ops.index(self.config.groups)
        expert_T1 = ops.reshape(group_T, (-1, 1)) * ops.index(size) + place_T1
        return fixed_routing(ops, expert_T1, self.num_experts, x_TD)
