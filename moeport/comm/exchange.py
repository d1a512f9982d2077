"""The all-to-all of experts that are spread over ranks: tokens to their experts, outputs back.

Rank r of W holds the experts r * E / W .. (r + 1) * E / W - 1. All algorithms are written over the communicator's
`start_all_to_all`, so they are differentiable and the same on every backend, and give the same outputs but for the
order of summation. Orders and splits are computed on the host from counts that are exchanged first.

An algorithm is a generator that yields each all_to_all it has started and goes on with the rows. So several parts of
the tokens take turns: while one computes or is on the host, those of the others are on their way.

Shape suffixes as in `moeport.core.ops`; e: experts of one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from moeport.comm.communicator import NUMBERS, Communicator, Waiting
from moeport.comm.traffic import Traffic, Volume
from moeport.core.array import Array
from moeport.core.dispatch import Experts, plan_dispatch
from moeport.core.ops import Ops
from moeport.core.routing import Routing

Steps = Generator[Waiting, Array, Array]
"""What an exchange does: yields each all_to_all it has started, is sent the rows, returns the outputs."""
Inner = Callable[[Array, Array], Steps]
"""`Experts` as steps."""


class ExpertExchange(ABC):
    """One all-to-all algorithm.

    Args:
        communicator: the ranks that share the experts.
        num_experts: E, a multiple of the number of ranks.
        chunks: equal parts of a rank's tokens, in their order, that take turns: while the experts compute on one,
            others are on their way, where the library sends beside the computation.
    """

    def __init__(self, communicator: Communicator, num_experts: int, chunks: int = 1):
        if num_experts % communicator.size:
            raise ValueError(
                f"{num_experts} experts do not divide among {communicator.size} ranks; expected a multiple of the ranks"
            )
        self.communicator, self.num_experts, self.chunks = communicator, num_experts, chunks

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """Outputs of the experts for the tokens of this rank, weighted by their gates and summed.

        Args:
            ops: the backend's operations.
            x_TD: tokens of this rank, at least one; each rank may have another number of them.
            routing: their assignments to the E experts.
            experts: see `Experts`.

        Returns: (T, D) in the type of x.
        """

        def run() -> Array:
            if self.chunks == 1:
                return _run([self.exchange(ops, x_TD, routing, _steps(experts))])[0]
            parts = _parts(ops, x_TD, routing, self.chunks)
            return ops.concat(_run([self.exchange(ops, *part, _steps(experts)) for part in parts]), axis=0)

        return _linked(ops, self.communicators, x_TD, run)

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """Outputs of the experts for rows of this rank, all at once, straight to their ranks and back.

        Args:
            ops: the backend's operations.
            x_RD: rows sorted by expert, at least one.
            counts_E: rows of each of the E experts.
            experts: see `Experts`.

        Returns: (R, D), in the order of x.
        """
        communicator, counts = self.communicator, ops.to_numpy(counts_E)
        steps = exchange_rows(ops, communicator, x_RD, counts, _steps(experts))
        return _linked(ops, [communicator], x_RD, lambda: _run([steps])[0])

    @property
    def communicators(self) -> tuple[Communicator, ...]:
        """Those that carry rows."""
        return (self.communicator,)

    @abstractmethod
    def exchange(self, ops: Ops, x_TD: Array, routing: Routing, experts: Inner) -> Steps:
        """The steps of `__call__` for a part of the tokens, which may be none."""


class FlatExchange(ExpertExchange):
    """Each assignment's row goes straight to the rank of its expert."""

    def exchange(self, ops: Ops, x_TD: Array, routing: Routing, experts: Inner) -> Steps:
        """See ExpertExchange."""
        return _by_assignment(
            ops, x_TD, routing, lambda x_RD, counts_E: exchange_rows(ops, self.communicator, x_RD, counts_E, experts)
        )


class TwoLevelExchange(ExpertExchange):
    """What the algorithms share that cross nodes along rails: ranks of equal position in their nodes.

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
    def communicators(self) -> tuple[Communicator, ...]:
        """See ExpertExchange."""
        return self.intra, self.rail


class HierarchicalExchange(TwoLevelExchange):
    """Rows cross to the expert's node along the rail, then go to its rank inside the node: fewer, longer messages."""

    def exchange(self, ops: Ops, x_TD: Array, routing: Routing, experts: Inner) -> Steps:
        """See ExpertExchange."""

        def node(x_RD: Array, counts: Array) -> Steps:
            return exchange_rows(ops, self.intra, x_RD, ops.to_numpy(counts), experts)

        return _by_assignment(
            ops, x_TD, routing, lambda x_RD, counts_E: exchange_rows(ops, self.rail, x_RD, counts_E, node)
        )


class NodeDedupExchange(TwoLevelExchange):
    """A token crosses to a node once, however many of its experts are there, and inside the node to a rank once.

    With the tokens travel, for each of their assignments there, the expert and the gate. The rank of the experts weighs
    and sums their outputs, the rank that received the token from another node sums what its neighbours return, and one
    row a token goes back.
    """

    def exchange(self, ops: Ops, x_TD: Array, routing: Routing, experts: Inner) -> Steps:
        """See ExpertExchange."""
        expert_N = ops.to_numpy(routing.expert_N)
        token_N = np.arange(len(expert_N)) // (routing.choices_per_token or 1)
        if routing.token_N is not None:
            token_N = ops.to_numpy(routing.token_N)
        served = np.flatnonzero(expert_N < self.num_experts)
        weight_P = ops.take_rows(routing.weight_N, ops.from_numpy(served))
        tokens = _Assigned(x_TD, token_N[served], expert_N[served], weight_P)

        def in_node(rows: _Assigned) -> Steps:
            return _send_once(ops, self.intra, rows, self.node_experts, lambda own: _apply(ops, own, local, experts))

        local = self.node_experts // self.intra.size
        return (yield from _send_once(ops, self.rail, tokens, self.num_experts, in_node))


@dataclass(frozen=True)
class _Assigned:
    """Rows and their assignments to experts, P pairs of a row and an expert."""

    x_RD: Array
    row_P: np.ndarray
    expert_P: np.ndarray
    weight_P: Array


def _send_once(
    ops: Ops, communicator: Communicator, rows: _Assigned, num_experts: int, inner: Callable[[_Assigned], Steps]
) -> Steps:
    """Send each row once to each member that has any of its experts, and add up what comes back for it.

    Args:
        ops: the backend's operations.
        communicator: its members hold the experts in order, equally many each.
        rows: of this member.
        num_experts: of all members.
        inner: what a member does with the rows it gets, whose experts count from its own first; (S, D) of S rows.

    Returns: steps to (R, D).
    """
    size, local = communicator.size, num_experts // communicator.size
    if size == 1:
        return (yield from inner(rows))
    member_P = rows.expert_P // local
    order = np.lexsort((rows.row_P, member_P))
    member_P, row_P = member_P[order], rows.row_P[order]
    first_P = np.ones(len(order), bool)
    first_P[1:] = (member_P[1:] != member_P[:-1]) | (row_P[1:] != row_P[:-1])
    sent, pairs = (np.bincount(members, minlength=size) for members in (member_P[first_P], member_P))
    place_P = np.cumsum(first_P) - 1 - _starts(sent)[member_P]

    counts = ops.from_numpy(np.stack([sent, pairs], axis=1).reshape(-1))
    counts = yield communicator.start_all_to_all(counts, [2] * size, [2] * size)
    got, got_pairs = ops.to_numpy(counts).reshape(-1, 2).T
    code_P = ops.from_numpy(place_P * local + rows.expert_P[order] % local)
    row_S = ops.from_numpy(row_P[first_P])
    code_P = ops.to_numpy((yield communicator.start_all_to_all(code_P, pairs, got_pairs)))
    weight_P = yield communicator.start_all_to_all(
        ops.take_rows(rows.weight_P, ops.from_numpy(order)), pairs, got_pairs
    )
    x_SD = yield communicator.start_all_to_all(ops.take_rows(rows.x_RD, row_S), sent, got)
    place_P = code_P // local + np.repeat(_starts(got), got_pairs)
    y_SD = yield from inner(_Assigned(x_SD, place_P, code_P % local, weight_P))
    y_SD = yield communicator.start_all_to_all(y_SD, got, sent)
    return ops.segment_sum(y_SD, row_S, rows.x_RD.shape[0])


def _apply(ops: Ops, rows: _Assigned, num_experts: int, experts: Inner) -> Steps:
    """The outputs of the experts that are here, weighted and summed for each row."""
    by_expert = np.argsort(rows.expert_P, kind="stable")
    row_P = ops.from_numpy(rows.row_P[by_expert])
    counts_E = ops.from_numpy(np.bincount(rows.expert_P, minlength=num_experts))
    y_PD = yield from experts(ops.take_rows(rows.x_RD, row_P), counts_E)
    weight_P = ops.cast(ops.take_rows(rows.weight_P, ops.from_numpy(by_expert)), ops.dtype(y_PD))
    return ops.segment_sum(y_PD * ops.reshape(weight_P, (-1, 1)), row_P, rows.x_RD.shape[0])


EXCHANGES: dict[str, type[ExpertExchange]] = {
    "flat": FlatExchange,
    "hierarchical": HierarchicalExchange,
    "node_dedup": NodeDedupExchange,
}
"""Algorithms by name."""


class CountedExchange:
    """An exchange of which the traffic of one layer is counted.

    Args:
        exchange: what carries the rows; layers may share it.
    """

    def __init__(self, exchange: ExpertExchange):
        self.exchange = exchange
        communicators = dict.fromkeys((exchange.communicator, *exchange.communicators))
        self._traffic = [
            (communicator, Traffic(communicator.rank, communicator.nodes)) for communicator in communicators
        ]

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """See ExpertExchange."""
        with self._counting():
            return self.exchange(ops, x_TD, routing, experts)

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """See ExpertExchange."""
        with self._counting():
            return self.exchange.of_rows(ops, x_RD, counts_E, experts)

    def forget(self) -> None:
        """Count from here: what an evaluation sent is no part of a step."""
        for _, traffic in self._traffic:
            traffic.reset()

    def sent(self) -> Volume:
        """What this rank sent to others since `forget`, forward and backward: rows of hidden states, and bytes of all,
        counts and gates included.
        """
        total = Volume()
        for _, traffic in self._traffic:
            for name, volume in traffic.volumes.items():
                total += replace(volume, intra_node_rows=0, inter_node_rows=0) if name == NUMBERS else volume
        return total

    def _counting(self) -> ExitStack:
        stack = ExitStack()
        for communicator, traffic in self._traffic:
            stack.enter_context(communicator.counting(traffic))
        return stack


def exchange_rows(ops: Ops, communicator: Communicator, x_RD: Array, counts_E: np.ndarray, experts: Inner) -> Steps:
    """Send rows to the members that hold their experts, apply those, and bring the outputs back.

    Args:
        ops: the backend's operations.
        communicator: its members hold the experts in order, equally many each.
        x_RD: rows sorted by expert.
        counts_E: rows of each expert, on the host.
        experts: those of this member.

    Returns: steps to (R, D), in the order of x.
    """
    size, local = communicator.size, len(counts_E) // communicator.size
    split = [local] * size
    got = yield communicator.start_all_to_all(ops.from_numpy(counts_E), split, split)
    got_We = ops.to_numpy(got).reshape(size, local)
    send, receive = counts_E.reshape(size, local).sum(1), got_We.sum(1)
    rows = yield communicator.start_all_to_all(x_RD, send, receive)
    expert_R = np.repeat(np.tile(np.arange(local), size), got_We.reshape(-1))
    by_expert = np.argsort(expert_R, kind="stable")
    outputs = yield from experts(ops.take_rows(rows, ops.from_numpy(by_expert)), ops.from_numpy(got_We.sum(0)))
    outputs = ops.take_rows(outputs, ops.from_numpy(np.argsort(by_expert)))
    return (yield communicator.start_all_to_all(outputs, receive, send))


def _steps(experts: Experts) -> Inner:
    def steps(x_RD: Array, counts_E: Array) -> Steps:
        yield from ()
        return experts(x_RD, counts_E)

    return steps


def _run(parts: Sequence[Steps]) -> list[Array]:
    """Let parts take turns, a step each, until all have returned; what they return.

    The order of the steps does not depend on the rows, so that it is the same on all ranks.
    """
    found: dict[int, Array] = {}
    arrivals = dict.fromkeys(range(len(parts)), lambda: None)
    while arrivals:
        for number, arrival in list(arrivals.items()):
            try:
                arrivals[number] = parts[number].send(arrival())
            except StopIteration as returned:
                found[number] = returned.value
                del arrivals[number]
    return [found[number] for number in range(len(parts))]


def _parts(ops: Ops, x_TD: Array, routing: Routing, chunks: int) -> list[tuple[Array, Routing]]:
    """Tokens and their assignments in consecutive parts of equal size, or nearly."""
    tokens = routing.num_tokens
    bounds = np.arange(chunks + 1) * tokens // chunks
    sizes = np.diff(bounds).tolist()
    choices = routing.choices_per_token
    token_N = None if routing.token_N is None else ops.to_numpy(routing.token_N)
    parts = []
    for first, size, x_SD in zip(bounds[:-1].tolist(), sizes, ops.split(x_TD, sizes, axis=0), strict=True):
        if token_N is not None:
            mine_N = np.flatnonzero((token_N >= first) & (token_N < first + size))
            own_N = ops.from_numpy(token_N[mine_N] - first)
        else:
            mine_N = np.arange(first * choices, (first + size) * choices)
            own_N = None if size else ops.from_numpy(mine_N)
        index_N = ops.from_numpy(mine_N)
        part = replace(
            routing,
            expert_N=ops.take_rows(routing.expert_N, index_N),
            weight_N=ops.take_rows(routing.weight_N, index_N),
            token_N=own_N,
            num_tokens=size,
        )
        parts.append((x_SD, part))
    return parts


def _by_assignment(ops: Ops, x_TD: Array, routing: Routing, exchange: Callable[[Array, np.ndarray], Steps]) -> Steps:
    """Rows sorted by expert through `exchange` and back to tokens; assignments to nowhere stay here."""
    plan = plan_dispatch(ops, routing)
    counts_E = ops.to_numpy(plan.counts_E)
    served, assignments = int(counts_E.sum()), routing.expert_N.shape[0]
    x_RD, _ = ops.split(ops.permute(x_TD, plan), (served, assignments - served), axis=0)
    y_RD = yield from exchange(x_RD, counts_E)
    if served < assignments:
        y_RD = ops.concat([y_RD, ops.zeros((assignments - served, x_TD.shape[1]), ops.dtype(y_RD))], axis=0)
    return ops.unpermute(y_RD, routing.weight_N, plan)


def _linked(ops: Ops, communicators: Sequence[Communicator], x_RD: Array, run: Waiting) -> Array:
    """`run()`, with this rank in the gradients of its exchanges whatever their rows depend on."""
    linked = [communicator for communicator in communicators if communicator.needs_link]
    for communicator in linked:
        communicator.link = ops.reshape(x_RD[:1, :1], (1,)) * ops.constant_like(0.0, x_RD)
    y_RD = run()
    for communicator in linked:
        y_RD = y_RD + communicator.link
        communicator.link = None
    return y_RD


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each block begins."""
    return np.cumsum(counts) - counts
