"""What an exchange asks of ranks and links: the stages of its all-to-alls, with their messages, rows and bytes.

Nothing here knows how fast a link is: `moeport.plan.cost` turns a load into seconds.

Shape suffix: W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Literal

import numpy as np

INDEX_BYTES, GATE_BYTES = 8, 4
"""Size of a count or an expert id (int64, as on PyTorch) and of a gate (float32)."""

Sharing = Literal["nothing", "node", "cluster"]
"""Which ranks share one processor: none, each rank has its device; those of a node, on CPUs; all, when emulated."""

Peers = tuple[int, int]
"""Ranks that a rank sends a message to in a stage: of its own node, and of other nodes."""


@dataclass(frozen=True)
class Layout:
    """The same number of ranks on each node, numbered node by node: a cluster, or the ranks that share one copy of the
    experts.
    """

    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        """Their number W."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Demand:
    """What is asked of an exchange: to bring the tokens of each rank to their experts and back."""

    tokens: int
    """Tokens per rank T."""
    top_k: int
    """Experts per token K."""
    num_experts: int
    """E, a multiple of the ranks."""
    row_bytes: int
    """Bytes per token."""
    backward: bool = False
    """Whether the backward pass counts too."""


@dataclass(frozen=True)
class Moved:
    """Rows of one all-to-all, per rank (W,)."""

    kept_W: np.ndarray
    sent_intra_W: np.ndarray
    """To other ranks of the same node."""
    sent_inter_W: np.ndarray
    """To other nodes."""
    received_intra_W: np.ndarray
    received_inter_W: np.ndarray

    @property
    def sent(self) -> np.ndarray:
        """Rows that each rank passes to the all-to-all, those for itself included."""
        return self.kept_W + self.sent_intra_W + self.sent_inter_W

    @property
    def received(self) -> np.ndarray:
        """Rows that each rank gets from it, those from itself included."""
        return self.kept_W + self.received_intra_W + self.received_inter_W

    def back(self) -> Moved:
        """The same rows on their way back."""
        return Moved(self.kept_W, self.received_intra_W, self.received_inter_W, self.sent_intra_W, self.sent_inter_W)

    def times(self, factor: float) -> Moved:
        """`factor` times the rows."""
        return Moved(*(factor * rows_W for rows_W in vars(self).values()))


@dataclass(frozen=True)
class Routes:
    """Rows of the all-to-alls of one exchange on their way to the experts."""

    flat: Moved
    """One per assignment, straight to the rank of its expert."""
    rail: Moved
    """One per assignment, to the rank of the same position in the node of its expert."""
    inside: Moved
    """One per assignment, from there to the rank of its expert."""
    tokens: Moved
    """Along the rail, one per token and node that has experts of it."""
    inside_tokens: Moved
    """From there, one per token and rank of the node that has experts of it."""


@dataclass(frozen=True)
class Load:
    """What one stage asks of the busiest rank and of the link of the busiest node."""

    stage: str
    intra_messages: float = 0.0
    inter_messages: float = 0.0
    intra_bytes: float = 0.0
    inter_bytes: float = 0.0
    """Through the link of one node, in the busier direction."""
    pair_bytes: float = 0.0
    """Mean bytes per pair of ranks, of `inter_bytes`."""
    meeting_bytes: float = 0.0
    """The part of `inter_bytes` that meets others at the link of the receiving node: all but what one node sends."""
    copied_rows: float = 0.0
    copied_bytes: float = 0.0
    is_backward: bool = False
    """Whether these are gradients, which take the reverse route of their rows."""


def ranks_sharing(shares: Sharing, cluster: Layout) -> int:
    """How many ranks share one processor."""
    return {"nothing": 1, "node": cluster.ranks_per_node, "cluster": cluster.ranks}[shares]


def all_reduce_load(layout: Layout, num_bytes: float, sharing: int) -> Load:
    """Load of an all-reduce of `num_bytes` over all ranks: 2 (W - 1) / W of them pass each rank, as in a ring, with the
    messages of a tree there and back. It is a pipeline: its messages do not wait for those of ranks that share a
    processor, and it keeps links busy in both directions.
    """
    passed = 2 * num_bytes * (layout.ranks - 1) / layout.ranks
    inside, between = (2.0 * ceil(log2(number)) for number in (layout.ranks_per_node, layout.nodes))
    return Load("all_reduce", inside, between, sharing * passed, passed if layout.nodes > 1 else 0.0)


class Stages:
    """Builds the load of one exchange, stage by stage.

    Args:
        layout: ranks and nodes.
        demand: tokens and experts.
        routes: the rows of its all-to-alls.
        sharing: consecutive ranks that share one processor, see `ranks_sharing`: its messages, bytes and copies are
            carried one after the other.
    """

    def __init__(self, layout: Layout, demand: Demand, routes: Routes, sharing: int = 1):
        self.layout, self.demand, self.routes, self.sharing = layout, demand, routes, sharing
        nodes, per_node = layout.nodes, layout.ranks_per_node
        self.all_peers: Peers = (per_node - 1, layout.ranks - per_node)
        self.rail_peers: Peers = (0, nodes - 1)
        """Ranks of the same position on other nodes."""
        self.node_peers: Peers = (per_node - 1, 0)
        self.passes = 2 if demand.backward else 1

    def per_token(self, rows_W: np.ndarray) -> float:
        """Rows of all ranks per token."""
        return float(rows_W.sum()) / (self.demand.tokens * self.layout.ranks)

    def counts(self, peers: Peers, numbers: int) -> Load:
        """`numbers` integers to each peer."""
        intra, inter = (np.full(self.layout.ranks, count * numbers) for count in peers)
        none = np.zeros(self.layout.ranks)
        return self.all_to_all("counts", peers, Moved(none, intra, inter, intra, inter), INDEX_BYTES)

    def differentiated(self, name: str, peers: Peers, moved: Moved, row_bytes: int) -> list[Load]:
        """Rows, and in a backward pass their gradients on the same way back."""
        found = [self.all_to_all(name, peers, rows, row_bytes) for rows in (moved, moved.back())[: self.passes]]
        return [replace(load, is_backward=number > 0) for number, load in enumerate(found)]

    def there_and_back(self, peers: Peers, moved: Moved) -> list[Load]:
        """Rows of tokens to the experts, and as many outputs back."""
        row_bytes = self.demand.row_bytes
        there = self.differentiated("dispatch", peers, moved, row_bytes)
        return there + self.differentiated("combine", peers, moved.back(), row_bytes)

    def copies(self, rows_W: np.ndarray) -> Load:
        """Rows that each rank copies between the all-to-alls of one pass; the last stage."""
        copied = self.passes * self._busiest(rows_W)
        return Load("copies", copied_rows=copied, copied_bytes=copied * self.demand.row_bytes)

    def all_to_all(self, name: str, peers: Peers, moved: Moved, row_bytes: int) -> Load:
        """One all-to-all: that of the busiest processor and of the busiest node."""
        layout = self.layout
        if self.sharing == 1:
            carried_W = np.maximum(moved.sent_intra_W, moved.received_intra_W)
        else:  # a processor that ranks share sends and receives what crosses nodes too
            carried_W = (moved.sent + moved.received) / 2 - moved.kept_W
        sent, received = (
            rows_W.reshape(layout.nodes, -1).sum(1) for rows_W in (moved.sent_inter_W, moved.received_inter_W)
        )
        inter_bytes = float(np.maximum(sent, received).max()) * row_bytes
        return Load(
            name,
            intra_messages=self.sharing * peers[0],
            inter_messages=self.sharing * peers[1],
            intra_bytes=self._busiest(carried_W) * row_bytes,
            inter_bytes=inter_bytes,
            pair_bytes=inter_bytes / max(1, layout.ranks_per_node * peers[1]),
            meeting_bytes=inter_bytes * (1 - 1 / max(1, layout.nodes - 1)),
        )

    def _busiest(self, value_W: np.ndarray) -> float:
        """The largest sum over ranks that share a processor. Where it has more ranks than this group, others like this
        group run on it at the same time.
        """
        together = min(self.sharing, self.layout.ranks)
        return float(value_W.reshape(-1, together).sum(1).max()) * self.sharing / together


@dataclass(frozen=True)
class Advantage:
    """A quantity in which one exchange differs from another: why it is fast, or why it is although it moves more."""

    quantity: str
    """As in `8 messages per rank to the experts`, without the number."""
    own: float
    other: float
    against: str
    """The algorithm it is compared with."""
