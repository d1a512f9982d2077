"""Along rails, then inside the node."""

from __future__ import annotations

from typing_extensions import override

from moeport.comm.exchange.rows import Inner, Steps, by_assignment, exchange_rows
from moeport.comm.exchange.two_level import TwoLevelExchange
from moeport.comm.load import Advantage, Load, Stages
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing


class HierarchicalExchange(TwoLevelExchange):
    """Rows cross to the expert's node along the rail, then go to its rank inside the node: fewer, longer messages."""

    name = "hierarchical"
    summary = "the same rows, first along rails (ranks at the same position in their nodes), then inside the node"

    @override
    def exchange(self, ops: Ops, x_TD: Array, routing: Routing, experts: Inner) -> Steps:
        def node(x_RD: Array, counts: Array) -> Steps:
            return exchange_rows(ops, self.intra, x_RD, ops.to_numpy(counts), experts)

        return by_assignment(
            ops, x_TD, routing, lambda x_RD, counts_E: exchange_rows(ops, self.rail, x_RD, counts_E, node)
        )

    @classmethod
    @override
    def load(cls, stages: Stages) -> list[Load]:
        routes, layout, experts = stages.routes, stages.layout, stages.demand.num_experts
        between = [stages.counts(stages.rail_peers, experts // layout.nodes)]
        between += stages.there_and_back(stages.rail_peers, routes.rail)
        inside = [stages.counts(stages.node_peers, experts // layout.ranks)]
        inside += stages.there_and_back(stages.node_peers, routes.inside)
        copied_W = 2 * routes.flat.sent + 2 * routes.rail.received + 3 * routes.flat.received
        return [*between, *inside, stages.copies(copied_W)]

    @classmethod
    def why(cls, stages: Stages) -> Advantage | None:
        """Its messages, against those of `flat`."""
        if stages.layout.nodes == 1:
            return None
        own, other = sum(stages.rail_peers) + sum(stages.node_peers), sum(stages.all_peers)
        return Advantage("messages per rank to the experts", own, other, "flat")
