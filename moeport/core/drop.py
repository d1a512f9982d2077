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
    experts, tokens = routing.num_experts, routing.num_tokens
    choices = routing.expert_N.shape[0] // tokens
    by_choice = ops.reshape(ops.transpose(ops.reshape(ops.arange(tokens * choices), (tokens, choices)), (1, 0)), (-1,))
    if policy in ("probability", "affinity"):
        key_N = routing.weight_N if policy == "probability" else routing.affinity_N
        assert key_N is not None  # the config lets only routers with affinities have the policy
        key_N = ops.stop_gradient(ops.take_rows(key_N, by_choice))
        by_choice = ops.take_rows(by_choice, ops.argsort(key_N, descending=True))
    elif policy == "random" and noise:
        by_choice = ops.take_rows(by_choice, ops.argsort(ops.concat(noise, axis=0)))
    expert_N = ops.take_rows(routing.expert_N, by_choice)
    by_expert = ops.argsort(expert_N)
    counts = ops.bincount(expert_N, experts + 1)
    first_row = ops.cumsum(counts, axis=0) - counts
    rank = ops.arange(tokens * choices) - ops.take_rows(first_row, ops.take_rows(expert_N, by_expert))
    assignment = ops.take_rows(by_choice, by_expert)
    rank_N = ops.take_rows(rank, ops.argsort(assignment))
    served_N = rank_N < (ops.index(capacity) if isinstance(capacity, int) else capacity)
    return replace(
        routing,
        expert_N=ops.where(served_N, routing.expert_N, ops.index(experts)),
        weight_N=ops.where(served_N, routing.weight_N, ops.constant_like(0.0, routing.weight_N)),
        all_routed=False,
    )
