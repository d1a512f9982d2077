"""Expert capacity: how many assignments an expert serves, and which are dropped."""

from __future__ import annotations

import math
from dataclasses import replace

from moeport.config.model import CapacityConfig
from moeport.core.ops import Ops
from moeport.core.routing import Routing


def expert_capacity(config: CapacityConfig, routing: Routing) -> int | None:
    """Assignments C an expert may serve: ceil(factor * T * K / E); None: as many as come.

    GShard (arXiv 2006.16668, section 2.2) and Switch (arXiv 2101.03961, eq. 3, where K = 1).
    """
    if config.policy == "dropless" or routing.choices_per_token is None:
        return None
    return math.ceil(config.factor * routing.num_tokens * routing.choices_per_token / routing.num_experts)


def drop_overflow(ops: Ops, routing: Routing, capacity: int, policy: str) -> Routing:
    """Send the assignments beyond an expert's capacity nowhere, with gate 0.

    `position`: all first choices come before all second ones, each in token order (GShard, Algorithm 1).
    `probability`: larger gates first; of equal ones, the earlier by position.
    Remaining gates are not renormalised.
    """
    experts, tokens = routing.num_experts, routing.num_tokens
    choices = routing.expert_N.shape[0] // tokens
    by_choice = ops.reshape(ops.transpose(ops.reshape(ops.arange(tokens * choices), (tokens, choices)), (1, 0)), (-1,))
    if policy == "probability":
        weight_N = ops.stop_gradient(ops.take_rows(routing.weight_N, by_choice))
        by_choice = ops.take_rows(by_choice, ops.argsort(weight_N, descending=True))
    expert_N = ops.take_rows(routing.expert_N, by_choice)
    by_expert = ops.argsort(expert_N)
    counts = ops.bincount(expert_N, experts + 1)
    first_row = ops.cumsum(counts, axis=0) - counts
    rank = ops.arange(tokens * choices) - ops.take_rows(first_row, ops.take_rows(expert_N, by_expert))
    assignment = ops.take_rows(by_choice, by_expert)
    rank_N = ops.take_rows(rank, ops.argsort(assignment))
    served_N = rank_N < ops.index(capacity)
    return replace(
        routing,
        expert_N=ops.where(served_N, routing.expert_N, ops.index(experts)),
        weight_N=ops.where(served_N, routing.weight_N, ops.constant_like(0.0, routing.weight_N)),
    )
