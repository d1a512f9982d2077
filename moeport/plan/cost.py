"""What an all-to-all of experts costs: rows and bytes of each of its stages, and the time that links take for them.

The stages are those of `moeport.comm.exchange`. Time is latency and bandwidth, the alpha-beta model (Hockney 1994), of
three link classes: copies inside a rank, links inside a node, and the link of a node to the others, which its ranks
share.

Shape suffixes: W ranks, P assignments of tokens to experts, T tokens of a rank, K choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, comb, log2
from typing import Literal

import numpy as np

INDEX_BYTES, GATE_BYTES = 8, 4
"""Of a count or an expert's number, int64 as on PyTorch, and of a gate, float32."""

Sharing = Literal["nothing", "node", "cluster"]
"""Which ranks share one processor: none, each rank has its device; those of a node, on CPUs; all, when emulated."""


@dataclass(frozen=True)
class Layout:
    """Ranks, equally many on each node, node after node: of a cluster, or those that share one copy of the experts."""

    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        """W."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Demand:
    """What is asked of an all-to-all: tokens of each rank to their experts and back."""

    tokens: int
    """Of one rank T."""
    top_k: int
    """Experts a token K."""
    num_experts: int
    """E, a multiple of the ranks."""
    row_bytes: int
    """Of one token."""
    backward: bool = False
    """Forward and backward pass in one."""


@dataclass(frozen=True)
class Moved:
    """Rows of one all-to-all, for each rank (W,)."""

    kept_W: np.ndarray
    sent_intra_W: np.ndarray
    """To others of its node."""
    sent_inter_W: np.ndarray
    """To other nodes."""
    received_intra_W: np.ndarray
    received_inter_W: np.ndarray

    @property
    def sent(self) -> np.ndarray:
        """What a rank passes to the all-to-all, rows for itself included."""
        return self.kept_W + self.sent_intra_W + self.sent_inter_W

    @property
    def received(self) -> np.ndarray:
        """What a rank gets from it, rows of its own included."""
        return self.kept_W + self.received_intra_W + self.received_inter_W

    def back(self) -> Moved:
        """The same rows on their way back."""
        return Moved(self.kept_W, self.received_intra_W, self.received_inter_W, self.sent_intra_W, self.sent_inter_W)

    def times(self, factor: float) -> Moved:
        """As many times the rows."""
        return Moved(*(factor * rows_W for rows_W in vars(self).values()))


@dataclass(frozen=True)
class Routes:
    """Rows of the all-to-alls of one exchange on their way to the experts."""

    flat: Moved
    """Assignments, straight to the rank of their expert."""
    rail: Moved
    """Assignments, to the rank of the same position in the node of their expert."""
    inside: Moved
    """Assignments, from there to the rank of their expert."""
    tokens: Moved
    """Tokens along the rail, once for each node that has experts of them."""
    inside_tokens: Moved
    """Tokens from there, once for each rank of the node that has experts of them."""


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
    """Of those, the bytes of one pair of ranks, in the mean."""
    meeting_bytes: float = 0.0
    """Of those, the bytes that meet others at the link of the node they go to: all but those from one of the nodes."""
    copied_rows: float = 0.0
    copied_bytes: float = 0.0
    is_backward: bool = False
    """Gradients on the way back that their rows came."""


@dataclass(frozen=True)
class Link:
    """One link class."""

    latency: float
    """Seconds a message; of copies, seconds a row."""
    bandwidth: float
    """Bytes a second; of the class between nodes, of the whole link of a node in one direction."""
    pair_bandwidth: float = np.inf
    """Between nodes: bytes a second of the time that one pair of ranks adds to a stage. Some libraries, gloo among
    them, send in one direction of a connection at a time, so that few pairs leave the link unused."""
    meeting_bandwidth: float = np.inf
    """Between nodes: bytes a second of the time that is lost where several nodes send to one (incast)."""

    def at(self, bandwidth: float) -> Link:
        """A link of another bandwidth with the same library."""
        faster = bandwidth / self.bandwidth if np.isfinite(self.bandwidth) else np.inf
        return Link(self.latency, bandwidth, self.pair_bandwidth * faster, self.meeting_bandwidth * faster)


@dataclass(frozen=True)
class Cost:
    """Seconds by cause."""

    latency: float
    intra: float
    inter: float
    copies: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.latency + self.intra + self.inter + self.copies


@dataclass(frozen=True)
class Links:
    """The links of a cluster."""

    intra: Link
    inter: Link
    copies: Link = Link(0.0, np.inf)
    """Default: copies take no time."""

    def transfers(self, load: Load) -> tuple[float, float]:
        """Seconds of the bytes inside nodes and of those between them."""
        inter = self.inter
        between = load.inter_bytes / inter.bandwidth
        between += load.pair_bytes / inter.pair_bandwidth + load.meeting_bytes / inter.meeting_bandwidth
        return load.intra_bytes / self.intra.bandwidth, between

    def cost(self, loads: list[Load]) -> Cost:
        """Time of stages that follow each other. Inside a stage bytes inside nodes and between them travel at once, so
        that the slower of the two counts.
        """
        latency = intra = inter = copies = 0.0
        for load in loads:
            latency += load.intra_messages * self.intra.latency + load.inter_messages * self.inter.latency
            inside, between = self.transfers(load)
            intra, inter = (intra, inter + between) if between > inside else (intra + inside, inter)
            copies += load.copied_rows * self.copies.latency + load.copied_bytes / self.copies.bandwidth
        return Cost(latency, intra, inter, copies)


def expected_routes(layout: Layout, demand: Demand, locality: float | None = None) -> Routes:
    """Expected rows, in closed form.

    With c = E / n experts on each of n nodes, j choices of a token are on its own node with probability P(j), and
    choices on either side are uniform without replacement. So a token misses a set of s of the E - c other experts with
    probability sum_j P(j) C(E - c - s, K - j) / C(E - c, K - j), and a set on its own node likewise. Another node is
    s = c, a rank s = E / W. For uniform choices P is hypergeometric and both are C(E - s, K) / C(E, K).

    Args:
        layout: ranks and nodes.
        demand: tokens and experts.
        locality: probability that a choice is on the token's own node, as far as the node has experts left: P is
            binomial and what exceeds either side moves to the other. None: all sets of K experts alike.
    """
    tokens, top_k, experts, per_node = demand.tokens, demand.top_k, demand.num_experts, layout.ranks_per_node
    near = experts // layout.nodes
    far = experts - near
    choices = range(top_k + 1)
    if locality is None:
        share = {j: comb(near, j) * comb(far, top_k - j) / comb(experts, top_k) for j in choices}
    else:
        share = dict.fromkeys(choices, 0.0)
        for j in choices:
            share[max(min(j, near), top_k - far)] += comb(top_k, j) * locality**j * (1 - locality) ** (top_k - j)
    nearby = sum(j * p for j, p in share.items())

    def reaches(size: int, is_own: bool) -> float:
        """Probability that a token has one of `size` experts, all on its own node or all on another one."""
        side = near if is_own else far
        drawn = ((j if is_own else top_k - j, p) for j, p in share.items() if p)
        return sum(p * (1 - comb(max(side - size, 0), chosen) / comb(side, chosen)) for chosen, p in drawn)

    others, local = layout.nodes - 1, experts // layout.ranks
    a_rank = reaches(local, True) + others * reaches(local, False)

    def even(kept: float, intra: float, inter: float) -> Moved:
        kept_W, intra_W, inter_W = (np.full(layout.ranks, tokens * rows) for rows in (kept, intra, inter))
        return Moved(kept_W, intra_W, inter_W, intra_W, inter_W)

    return Routes(
        flat=even(nearby / per_node, nearby * (1 - 1 / per_node), top_k - nearby),
        rail=even(nearby, 0.0, top_k - nearby),
        inside=even(top_k / per_node, top_k * (1 - 1 / per_node), 0.0),
        tokens=even(reaches(near, True), 0.0, others * reaches(near, False)),
        inside_tokens=even(a_rank, (per_node - 1) * a_rank, 0.0),
    )


def counted_routes(layout: Layout, demand: Demand, expert_TK: np.ndarray) -> Routes:
    """Rows of given choices, which are divided among the ranks in order and stand for the tokens of the demand.

    Args:
        layout: ranks and nodes.
        demand: tokens and experts.
        expert_TK: experts of a token of each rank at least, (T, K).
    """
    ranks, per_node, nodes = layout.ranks, layout.ranks_per_node, layout.nodes
    tokens, top_k = expert_TK.shape
    parts = [len(part) for part in np.array_split(np.arange(tokens), ranks)]
    source_P = np.repeat(np.arange(ranks), np.array(parts) * top_k)
    target_P = expert_TK.reshape(-1) // (demand.num_experts // ranks)
    relay_P = target_P // per_node * per_node + source_P % per_node
    token_P = np.arange(tokens).repeat(top_k)
    _, at_node = np.unique(token_P * nodes + target_P // per_node, return_index=True)
    _, at_rank = np.unique(token_P * ranks + target_P, return_index=True)
    scale = demand.tokens * ranks / tokens

    def moved(source_R: np.ndarray, target_R: np.ndarray) -> Moved:
        kept, intra = source_R == target_R, source_R // per_node == target_R // per_node
        rows = (
            np.bincount(rank_R[chosen], minlength=ranks)
            for rank_R, chosen in (
                (source_R, kept),
                (source_R, intra & ~kept),
                (source_R, ~intra),
                (target_R, intra & ~kept),
                (target_R, ~intra),
            )
        )
        return Moved(*rows).times(scale)

    return Routes(
        flat=moved(source_P, target_P),
        rail=moved(source_P, relay_P),
        inside=moved(relay_P, target_P),
        tokens=moved(source_P[at_node], relay_P[at_node]),
        inside_tokens=moved(relay_P[at_rank], target_P[at_rank]),
    )


def ranks_sharing(shares: Sharing, cluster: Layout) -> int:
    """How many ranks share one processor."""
    return {"nothing": 1, "node": cluster.ranks_per_node, "cluster": cluster.ranks}[shares]


def loads(algorithm: str, layout: Layout, demand: Demand, routes: Routes, sharing: int = 1) -> list[Load]:
    """The stages of one exchange, in order, the copies that a rank makes between them last.

    Args:
        algorithm: of `moeport.comm.exchange.EXCHANGES`.
        layout: ranks and nodes.
        demand: tokens and experts.
        routes: its rows.
        sharing: consecutive ranks that share one processor, see `ranks_sharing`: its messages, bytes and copies are
            carried one after the other.
    """
    nodes, per_node, experts, row = layout.nodes, layout.ranks_per_node, demand.num_experts, demand.row_bytes
    every, rail, node = (per_node - 1, layout.ranks - per_node), (0, nodes - 1), (per_node - 1, 0)
    passes = 2 if demand.backward else 1
    busiest = _Busiest(layout, sharing)
    local = experts // layout.ranks

    def counts(peers: tuple[int, int], numbers: int) -> Load:
        intra, inter = (np.full(layout.ranks, count * numbers) for count in peers)
        none = np.zeros(layout.ranks)
        return busiest.load("counts", peers, Moved(none, intra, inter, intra, inter), INDEX_BYTES)

    def stage(name: str, peers: tuple[int, int], moved: Moved, row_bytes: int) -> list[Load]:
        """The rows, and their gradients on the same way back."""
        found = [busiest.load(name, peers, rows, row_bytes) for rows in (moved, moved.back())[:passes]]
        return [replace(load, is_backward=number > 0) for number, load in enumerate(found)]

    def there_and_back(peers: tuple[int, int], moved: Moved) -> list[Load]:
        return stage("dispatch", peers, moved, row) + stage("combine", peers, moved.back(), row)

    def once(peers: tuple[int, int], pairs: Moved, tokens: Moved) -> list[Load]:
        """Tokens with the experts and gates of their assignments; nothing in a group of one."""
        if not sum(peers):
            return []
        numbers = [counts(peers, 2), busiest.load("numbers", peers, pairs, INDEX_BYTES)]
        return numbers + stage("gates", peers, pairs, GATE_BYTES) + there_and_back(peers, tokens)

    sent_W, served_W = routes.flat.sent, routes.flat.received
    if algorithm == "flat":
        found = [counts(every, local), *there_and_back(every, routes.flat)]
        copied_W = 2 * sent_W + 3 * served_W  # sorted by expert, through the experts, and sorted back
    elif algorithm == "hierarchical":
        found = [counts(rail, experts // nodes), *there_and_back(rail, routes.rail)]
        found += [counts(node, local), *there_and_back(node, routes.inside)]
        copied_W = 2 * sent_W + 2 * routes.rail.received + 3 * served_W
    else:
        found = once(rail, routes.rail, routes.tokens) + once(node, routes.inside, routes.inside_tokens)
        tokens_W = routes.tokens.sent * (nodes > 1) + routes.inside_tokens.sent * (per_node > 1)
        copied_W = 2 * tokens_W + 4 * served_W  # sorted by expert, through the experts, weighed and summed
    copied = passes * busiest.rank(copied_W)
    return [*found, Load("copies", copied_rows=copied, copied_bytes=copied * row)]


def all_reduce_load(layout: Layout, num_bytes: float, sharing: int) -> Load:
    """Of an array of so many bytes over all ranks: twice (W - 1) / W of it past each rank, as in a ring, and the
    messages of a tree there and back. It is a pipeline: its messages do not wait for those of ranks that share a
    processor, and it keeps links busy in both directions.
    """
    passed = 2 * num_bytes * (layout.ranks - 1) / layout.ranks
    inside, between = (2.0 * ceil(log2(number)) for number in (layout.ranks_per_node, layout.nodes))
    return Load("all_reduce", inside, between, sharing * passed, passed if layout.nodes > 1 else 0.0)


class _Busiest:
    """From rows of all ranks to the load of the busiest processor and node."""

    def __init__(self, layout: Layout, sharing: int):
        self.layout, self.sharing = layout, sharing

    def load(self, stage: str, peers: tuple[int, int], moved: Moved, row_bytes: int) -> Load:
        if self.sharing == 1:
            carried_W = np.maximum(moved.sent_intra_W, moved.received_intra_W)
        else:  # a processor that ranks share sends and receives what crosses nodes too
            carried_W = (moved.sent + moved.received) / 2 - moved.kept_W
        sent, received = (
            rows_W.reshape(self.layout.nodes, -1).sum(1) for rows_W in (moved.sent_inter_W, moved.received_inter_W)
        )
        inter_bytes = float(np.maximum(sent, received).max()) * row_bytes
        return Load(
            stage,
            intra_messages=self.sharing * peers[0],
            inter_messages=self.sharing * peers[1],
            intra_bytes=self.rank(carried_W) * row_bytes,
            inter_bytes=inter_bytes,
            pair_bytes=inter_bytes / max(1, self.layout.ranks_per_node * peers[1]),
            meeting_bytes=inter_bytes * (1 - 1 / max(1, self.layout.nodes - 1)),
        )

    def rank(self, value_W: np.ndarray) -> float:
        """Of the ranks that share a processor; groups alike run at once where it has more ranks than this one."""
        together = min(self.sharing, self.layout.ranks)
        return float(value_W.reshape(-1, together).sum(1).max()) * self.sharing / together
