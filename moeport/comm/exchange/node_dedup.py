"""A token once per node, and inside the node once per rank.

Shape suffixes as in `moeport.core.ops`; P pairs of a row and an expert, S rows sent or received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from moeport.comm.communicator import Communicator
from moeport.comm.exchange.base import BETWEEN_NODES
from moeport.comm.exchange.rows import Inner, Steps
from moeport.comm.exchange.two_level import TwoLevelExchange
from moeport.comm.load import GATE_BYTES, INDEX_BYTES, Advantage, Load, Moved, Peers, Stages
from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing


class NodeDedupExchange(TwoLevelExchange):
    """A token crosses to a node once, however many of its experts are there, and inside the node once to each rank.

    The expert and the gate of each assignment travel with the token. The rank of the experts weights and sums their
    outputs, the rank that received the token from another node sums what its neighbours return, and one row per token
    goes back.
    """

    name = "node_dedup"
    summary = (
        "each token once per node that has experts for it, where their outputs are weighted and summed into one row "
        "back; inside the node, once per rank in the same way"
    )

    @override
    def exchange(self, ops: Ops, x_TD: Array, routing: Routing, experts: Inner) -> Steps:
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

    @classmethod
    @override
    def load(cls, stages: Stages) -> list[Load]:
        routes, layout = stages.routes, stages.layout
        found = _load_once(stages, stages.rail_peers, routes.rail, routes.tokens)
        found += _load_once(stages, stages.node_peers, routes.inside, routes.inside_tokens)
        tokens_W = routes.tokens.sent * (layout.nodes > 1) + routes.inside_tokens.sent * (layout.ranks_per_node > 1)
        copied_W = 2 * tokens_W + 4 * routes.flat.received  # sorted by expert, through the experts, weighed and summed
        return [*found, stages.copies(copied_W)]

    @classmethod
    def why(cls, stages: Stages) -> Advantage | None:
        """Its rows, against those of `flat`."""
        routes = stages.routes
        if stages.layout.nodes == 1:
            own, other = (stages.per_token(moved.sent_intra_W) for moved in (routes.inside_tokens, routes.flat))
            return Advantage("rows per token to other ranks of the node", own, other, "flat")
        own, other = (stages.per_token(moved.sent_inter_W) for moved in (routes.tokens, routes.flat))
        return Advantage(BETWEEN_NODES, own, other, "flat")


def _load_once(stages: Stages, peers: Peers, pairs: Moved, tokens: Moved) -> list[Load]:
    """Tokens with the experts and gates of their assignments; nothing in a group of one."""
    if not sum(peers):
        return []
    numbers = [stages.counts(peers, 2), stages.all_to_all("numbers", peers, pairs, INDEX_BYTES)]
    gates = stages.differentiated("gates", peers, pairs, GATE_BYTES)
    return numbers + gates + stages.there_and_back(peers, tokens)


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
        communicator: its members hold the experts in order, the same number each.
        rows: of this member.
        num_experts: of all members.
        inner: what a member does with the S rows it gets, with experts numbered from its own first; returns (S, D).

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
    """Outputs of the local experts, weighted and summed per row."""
    by_expert = np.argsort(rows.expert_P, kind="stable")
    row_P = ops.from_numpy(rows.row_P[by_expert])
    counts_E = ops.from_numpy(np.bincount(rows.expert_P, minlength=num_experts))
    y_PD = yield from experts(ops.take_rows(rows.x_RD, row_P), counts_E)
    weight_P = ops.cast(ops.take_rows(rows.weight_P, ops.from_numpy(by_expert)), ops.dtype(y_PD))
    return ops.segment_sum(y_PD * ops.reshape(weight_P, (-1, 1)), row_P, rows.x_RD.shape[0])


def _starts(counts: np.ndarray) -> np.ndarray:
    """Start of each block."""
    return np.cumsum(counts) - counts
