"""What stands in for the exchange or the router of a layer in a benchmark.

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


class OwnExperts:
    """Stands where an exchange does: as many rows, all to the experts of this rank.

    Args:
        num_experts: of this rank.
    """

    communicators: tuple[Communicator, ...] = ()
    chunks = 1

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """See ExpertExchange; expert j of all stands for expert j mod e."""
        expert_N = ops.to_numpy(routing.expert_N)
        own_N = np.where(expert_N < routing.num_experts, expert_N % self.num_experts, self.num_experts)
        own = replace(routing, expert_N=ops.from_numpy(own_N), num_experts=self.num_experts)
        x_RD, counts_e, plan = dispatch(ops, x_TD, own)
        return combine(ops, experts(x_RD, counts_e), own, plan)

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """See ExpertExchange; each expert takes the rows of as many that follow each other."""
        return experts(x_RD, ops.from_numpy(ops.to_numpy(counts_E).reshape(self.num_experts, -1).sum(1)))


class GivenChoices(Router[Any]):
    """A router that scores and weighs, and whose choices are given."""

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
