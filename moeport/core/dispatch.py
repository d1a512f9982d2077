"""Dispatch: from token order to expert order and back.

`dispatch` and `combine` are pure functions joined by a frozen `DispatchPlan`; between them stand the experts, and the
all-to-all when experts are spread over ranks. Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeport.core.ops import Array, Ops
from moeport.core.routing import Routing


@dataclass(frozen=True)
class DispatchPlan:
    """Where every assignment goes. R = N rows: those sent nowhere come last."""

    order_R: Array
    """Assignment of each row."""
    position_N: Array
    """Row of each assignment: the inverse of order_R."""
    token_R: Array
    """Token of each row."""
    counts_E: Array
    """Rows of each expert; rows after the last counted one are served by nobody."""
    num_tokens: int
    """T."""
    choices_per_token: int
    """K."""


def plan_dispatch(ops: Ops, routing: Routing) -> DispatchPlan:
    """Sort assignments by expert; within an expert they keep token order."""
    order_R = ops.argsort(routing.expert_N)
    choices = routing.choices_per_token
    return DispatchPlan(
        order_R=order_R,
        position_N=ops.argsort(order_R),
        token_R=order_R // ops.index(choices),
        counts_E=ops.bincount(routing.expert_N, routing.num_experts + 1)[: routing.num_experts],
        num_tokens=routing.num_tokens,
        choices_per_token=choices,
    )


def dispatch(ops: Ops, x_TD: Array, routing: Routing) -> tuple[Array, Array, DispatchPlan]:
    """Rows in expert order.

    Returns: (x_RD, counts_E, plan).
    """
    plan = plan_dispatch(ops, routing)
    return ops.permute(x_TD, plan), plan.counts_E, plan


def combine(ops: Ops, y_RD: Array, routing: Routing, plan: DispatchPlan) -> Array:
    """Sum of each token's rows weighted by their gates, (T, D) in the type of y."""
    return ops.unpermute(y_RD, routing.weight_N, plan)
