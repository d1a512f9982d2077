"""Exchanges in two levels: between nodes along rails, then inside the node."""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from moeport.comm.communicator import Communicator
from moeport.comm.exchange.base import ExpertExchange


class TwoLevelExchange(ExpertExchange):
    """What the algorithms share that cross nodes along rails: ranks of the same position in their nodes.

    Args:
        communicator: as in ExpertExchange; its nodes have equally many ranks, in the order of the ranks.
        num_experts: as there.
        chunks: as there.
    """

    def __init__(self, communicator: Communicator, num_experts: int, chunks: int = 1):
        super().__init__(communicator, num_experts, chunks)
        ranks, nodes = communicator.ranks, communicator.nodes
        per_node = nodes.count(nodes[0])
        if nodes != tuple(np.repeat(sorted(set(nodes)), per_node)):
            raise ValueError(
                f"the ranks {list(ranks)} are on nodes {list(nodes)}; expected as many on each node, node after node"
            )
        self.intra = communicator.group([ranks[start : start + per_node] for start in range(0, len(ranks), per_node)])
        """The ranks of this node."""
        self.rail = communicator.group([ranks[position::per_node] for position in range(per_node)])
        """The ranks of all nodes at this rank's position."""
        self.node_experts = num_experts // self.rail.size

    @property
    @override
    def communicators(self) -> tuple[Communicator, ...]:
        return self.intra, self.rail
