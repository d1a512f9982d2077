"""Every row straight to its rank."""

from __future__ import annotations

from typing_extensions import override

from moeport.comm.exchange.base import BETWEEN_NODES, ExpertExchange
from moeport.comm.exchange.rows import Inner, Steps, by_assignment, exchange_rows
from moeport.comm.load import Advantage, Load, Stages
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing


class FlatExchange(ExpertExchange):
    """Each assignment's row goes straight to the rank of its expert."""

    name = "flat"
    summary = "a row per assignment, straight to the rank of its expert"

    @override
    def exchange(self, ops: Ops, x_TD: Array, routing: Routing, experts: Inner) -> Steps:
        return by_assignment(
            ops, x_TD, routing, lambda x_RD, counts_E: exchange_rows(ops, self.communicator, x_RD, counts_E, experts)
        )

    @classmethod
    @override
    def load(cls, stages: Stages) -> list[Load]:
        rows, local = stages.routes.flat, stages.demand.num_experts // stages.layout.ranks
        copied_W = 2 * rows.sent + 3 * rows.received  # sorted by expert, through the experts, and sorted back
        counts = stages.counts(stages.all_peers, local)
        return [counts, *stages.there_and_back(stages.all_peers, rows), stages.copies(copied_W)]

    @classmethod
    def why(cls, stages: Stages) -> Advantage | None:
        """Its rows between nodes, against those of `node_dedup`, which sends fewer and takes more stages."""
        if stages.layout.nodes == 1:
            return None
        own, other = (stages.per_token(moved.sent_inter_W) for moved in (stages.routes.flat, stages.routes.tokens))
        return Advantage(BETWEEN_NODES, own, other, "node_dedup")
