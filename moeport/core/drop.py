"""Drop policies: which assignments an expert serves when there are more than its capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.routing import Routing

DROP_NOISE = "drop_{}"
"""Name of the uniform random numbers that order the assignments of choice 0 .. K-1 under policy `random`."""


def drop_overflow(
    ops: Ops, routing: Routing, capacity: int | Array, policy: str, noise: Sequence[Array] = ()
) -> Routing:
    """Drop the assignments beyond an expert's capacity: their expert becomes E and their gate 0.

    `position`: all first choices come before all second ones, each in token order (GShard, Algorithm 1).
    `probability`: larger gates first.
    `affinity`: larger affinities first: the expert's choice of Expert-Token Resonance (arXiv 2406.00023, eq. 6, which
    prints the lowest; its text says highest).
    `random`: by `noise`, regardless of the choice; without noise (outside training), by position.
    Ties go to the earlier position. The remaining gates are not renormalised.

    Args:
        ops: the backend's operations.
        routing: what the router chose.
        capacity: C, the most assignments an expert serves; a number, or a scalar array of the index type.
        policy: which assignments are served first.
        noise: for `random` in training, K arrays (T,) of uniform numbers.
    """
    limit = ops.index(capacity) if isinstance(capacity, int) else capacity
    return _keep(ops, routing, _rank(ops, routing, policy, noise) < limit)


def keep_best(ops: Ops, routing: Routing, capacity_E: Array) -> Routing:
    """`drop_overflow` by the policy `probability`, with a capacity for each expert, (E,) of the index type."""
    limit = ops.concat([capacity_E, ops.arange(1)], axis=0)  # none for expert E, which is no expert
    return _keep(ops, routing, _rank(ops, routing, "probability", ()) < ops.take_rows(limit, routing.expert_N))


def _rank(ops: Ops, routing: Routing, policy: str, noise: Sequence[Array]) -> Array:
    """How many assignments its expert serves before each one, (N,)."""
    experts, tokens = routing.num_experts, routing.num_tokens
    choices = routing.expert_N.shape[0] // tokens
    by_choice = _swapped(ops, ops.arange(tokens * choices), tokens, choices)
    order = None
    if policy in ("probability", "affinity"):
        key_N = routing.weight_N if policy == "probability" else routing.affinity_N
        assert key_N is not None  # the config lets only routers with affinities have the policy
        key_N = ops.stop_gradient(ops.take_rows(key_N, by_choice))
        order = ops.argsort(key_N, descending=True)
    elif policy == "random" and noise:
        order = ops.argsort(ops.concat(noise, axis=0))
    if order is not None:
        by_choice = ops.take_rows(by_choice, order)
    rank_N = rank_in_group(ops, ops.take_rows(routing.expert_N, by_choice), experts + 1)
    if order is not None:
        rank_N = ops.take_rows(rank_N, ops.inverse(order))
    return _swapped(ops, rank_N, choices, tokens)


def _keep(ops: Ops, routing: Routing, served_N: Array) -> Routing:
    return replace(
        routing,
        expert_N=ops.where(served_N, routing.expert_N, ops.index(routing.num_experts)),
        weight_N=ops.where(served_N, routing.weight_N, ops.constant_like(0.0, routing.weight_N)),
        all_routed=False,
    )


def rank_in_group(ops: Ops, group_N: Array, groups: int) -> Array:
    """How many earlier entries of its own group each entry has, (N,). Arguments as in `Ops.sort_by_group`."""
    _, place_N, counts = ops.sort_by_group(group_N, groups)
    return place_N - ops.take_rows(ops.cumsum(counts, axis=0) - counts, group_N)


def _swapped(ops: Ops, x_N: Array, rows: int, columns: int) -> Array:
    """The transpose of a matrix that is given and returned row by row."""
    return ops.reshape(ops.transpose(ops.reshape(x_N, (rows, columns)), (1, 0)), (-1,))
