"""Stand-ins for the exchange or the router of a layer in a benchmark.

Shape suffixes as in `moeport.core.ops`; e: experts of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from typing_extensions import override

from moeport.comm.communicator import Communicator
from moeport.core.array import Array
from moeport.core.dispatch import Experts, combine, dispatch
from moeport.core.ops import Ops
from moeport.core.parameters import ParameterSpec
from moeport.core.routing import RouterContext, Routing, SoftRouting
from moeport.routers.base import Router


class LocalExperts:
    """Replaces an exchange: sends the same number of rows, all to the local experts.

    Args:
        num_experts: number of local experts.
    """

    communicators: tuple[Communicator, ...] = ()
    chunks = 1

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """As ExpertExchange, with local expert j mod e in place of expert j."""
        expert_N = ops.to_numpy(routing.expert_N)
        local_N = np.where(expert_N < routing.num_experts, expert_N % self.num_experts, self.num_experts)
        local = replace(routing, expert_N=ops.from_numpy(local_N), num_experts=self.num_experts)
        x_RD, counts_e, plan = dispatch(ops, x_TD, local)
        return combine(ops, experts(x_RD, counts_e), local, plan)

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """As ExpertExchange; each local expert takes the rows of E / e consecutive experts."""
        return experts(x_RD, ops.from_numpy(ops.to_numpy(counts_E).reshape(self.num_experts, -1).sum(1)))


class FixedChoices(Router[Any]):
    """A router with the scores and gates of another, and with fixed choices."""

    def __init__(self, router: Router[Any], expert_N: Array):
        super().__init__(router.config, router.d_model, router.num_experts, router.init_std, router.vocab_size)
        self.router, self.expert_N, self.noise = router, expert_N, router.noise

    @override
    def parameter_specs(self) -> list[ParameterSpec]:
        return self.router.parameter_specs()

    @override
    def route(self, ops: Ops, params: Mapping[str, Array], x_TD: Array, context: RouterContext) -> Routing:
        chosen = self.router.route(ops, params, x_TD, context)
        assert not isinstance(chosen, SoftRouting)
        return replace(chosen, expert_N=self.expert_N)

    @override
    def gate_cosines(self, ops: Ops, params: Mapping[str, Array], x_TD: Array) -> Array:
        return self.router.gate_cosines(ops, params, x_TD)
