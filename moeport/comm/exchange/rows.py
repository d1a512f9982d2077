"""How rows travel to the members of a communicator and back, for all exchanges.

An algorithm is a generator that yields each all_to_all it has started and is resumed with the rows. So several parts of
the tokens take turns: while one computes or is on the host, the rows of the others are under way.

Shape suffixes as in `moeport.core.ops`; e: experts of one rank, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moeport.comm.communicator import Communicator, Pending
from moeport.core.array import Array
from moeport.core.dispatch import Experts, plan_dispatch
from moeport.core.ops import Ops
from moeport.core.routing import Routing

Steps = Generator[Pending, Array, Array]
"""An exchange in steps: it yields each all_to_all it has started, is sent the rows, and returns the outputs."""
Inner = Callable[[Array, Array], Steps]
"""`Experts` as steps."""


def exchange_rows(ops: Ops, communicator: Communicator, x_RD: Array, counts_E: np.ndarray, experts: Inner) -> Steps:
    """Send rows to the members that hold their experts, apply those, and bring the outputs back.

    Args:
        ops: the backend's operations.
        communicator: its members hold the experts in order, the same number each.
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
    # Keys of 16 bits are counted, not compared; no rank has more experts than these can name.
    expert_R = np.repeat(np.tile(np.arange(local, dtype=np.uint16), size), got_We.reshape(-1))
    by_expert = np.argsort(expert_R, kind="stable")
    place_R = np.empty_like(by_expert)
    place_R[by_expert] = np.arange(len(by_expert))
    outputs = yield from experts(ops.take_rows(rows, ops.from_numpy(by_expert)), ops.from_numpy(got_We.sum(0)))
    outputs = ops.take_rows(outputs, ops.from_numpy(place_R))
    return (yield communicator.start_all_to_all(outputs, receive, send))


def by_assignment(ops: Ops, x_TD: Array, routing: Routing, exchange: Callable[[Array, np.ndarray], Steps]) -> Steps:
    """Sends rows, sorted by expert, through `exchange` and back to their tokens; unrouted assignments stay here."""
    plan = plan_dispatch(ops, routing)
    counts_E = ops.to_numpy(plan.counts_E)
    served, assignments = int(counts_E.sum()), routing.expert_N.shape[0]
    x_RD, _ = ops.split(ops.permute(x_TD, plan), (served, assignments - served), axis=0)
    y_RD = yield from exchange(x_RD, counts_E)
    if served < assignments:
        y_RD = ops.concat([y_RD, ops.zeros((assignments - served, x_TD.shape[1]), ops.dtype(y_RD))], axis=0)
    return ops.unpermute(y_RD, routing.weight_N, plan)


def as_steps(experts: Experts) -> Inner:
    """Experts that wait for nothing, as steps."""

    def steps(x_RD: Array, counts_E: Array) -> Steps:
        yield from ()
        return experts(x_RD, counts_E)

    return steps


def run_in_turn(parts: Sequence[Steps]) -> list[Array]:
    """Let parts take turns, one step each, until all have returned; returns their outputs.

    The order of the steps does not depend on the rows, so that it is the same on all ranks.
    """
    found: dict[int, Array] = {}
    arrivals: dict[int, Callable[[], Any]] = dict.fromkeys(range(len(parts)), lambda: None)
    while arrivals:
        for number, arrival in list(arrivals.items()):
            try:
                arrivals[number] = parts[number].send(arrival())
            except StopIteration as returned:
                found[number] = returned.value
                del arrivals[number]
    return [found[number] for number in range(len(parts))]


def in_chunks(ops: Ops, x_TD: Array, routing: Routing, chunks: int) -> list[tuple[Array, Routing]]:
    """Tokens and their assignments in consecutive parts whose sizes differ by at most one."""
    tokens = routing.num_tokens
    bounds = np.arange(chunks + 1) * tokens // chunks
    sizes = np.diff(bounds).tolist()
    choices = routing.choices_per_token
    token_N = None if routing.token_N is None else ops.to_numpy(routing.token_N)
    parts = []
    own_N: Array | None
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


def linked_run(ops: Ops, communicators: Sequence[Communicator], x_RD: Array, run: Pending) -> Array:
    """`run()`, with this rank in the gradients of its exchanges whatever their rows depend on."""
    linked = [communicator for communicator in communicators if communicator.needs_link]
    for communicator in linked:
        communicator.link = ops.reshape(x_RD[:1, :1], (1,)) * ops.constant_like(0.0, x_RD)
    y_RD = run()
    for communicator in linked:
        y_RD = y_RD + communicator.link
        communicator.link = None
    return y_RD
