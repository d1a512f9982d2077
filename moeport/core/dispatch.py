"""Dispatch: from token order to expert order and back.

`dispatch` and `combine` are pure functions joined by a frozen `DispatchPlan`; between them come the experts, and the
all-to-all when experts are spread over ranks. Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from moeport.core.array import Array
from moeport.core.dispatch_plan import DispatchPlan
from moeport.core.ops import Ops
from moeport.core.routing import Routing, SoftRouting

Experts = Callable[[Array, Array], Array]
"""The local experts: a function from rows sorted by expert (R, D) and counts (e,) to outputs (R, D)."""


class RunExperts(Protocol):
    """How a backend supplies a computation with the weights of the local experts, gathered if they are sharded."""

    def __call__(self, compute: Callable[..., Array], *arrays: Array) -> Array:
        """Returns `compute(w_in, w_out, *arrays)`; every array that needs a gradient must be among `arrays`."""


class RunPart(Protocol):
    """How a backend supplies a computation with the parameters of one part of a layer, such as `router`."""

    def __call__(self, part: str, compute: Callable[..., Any], *arrays: Array) -> Any:
        """Returns `compute(params, *arrays)`; every array that needs a gradient must be among `arrays`.

        Args:
            part: the first component of the parameters' names.
            compute: takes the part's parameters by the rest of their names, then the arrays.
            *arrays: what the part is applied to.
        """


class Exchange(Protocol):
    """How tokens reach experts on other ranks and come back."""

    def __call__(self, ops: Ops, x_TD: Array, routing: Routing, experts: Experts) -> Array:
        """Expert outputs for the tokens of this rank, weighted by their gates and summed, (T, D)."""

    def of_rows(self, ops: Ops, x_RD: Array, counts_E: Array, experts: Experts) -> Array:
        """Expert outputs for the rows of this rank, which are sorted by expert, (R, D)."""


def plan_dispatch(ops: Ops, routing: Routing) -> DispatchPlan:
    """Sort assignments by expert; within an expert they keep token order."""
    order_R, position_N, counts = ops.sort_by_group(routing.expert_N, routing.num_experts + 1)
    if routing.token_N is None:
        token_R = order_R // ops.index(routing.expert_N.shape[0] // routing.num_tokens)
    else:
        token_R = ops.take_rows(routing.token_N, order_R)
    return DispatchPlan(
        order_R=order_R,
        position_N=position_N,
        token_R=token_R,
        counts_E=counts[: routing.num_experts],
        num_tokens=routing.num_tokens,
        choices_per_token=routing.choices_per_token,
        serves_every_row=routing.all_routed,
    )


def dispatch(ops: Ops, x_TD: Array, routing: Routing) -> tuple[Array, Array, DispatchPlan]:
    """Copy each token to its rows, in expert order.

    Returns: (x_RD, counts_E, plan).
    """
    plan = plan_dispatch(ops, routing)
    return ops.permute(x_TD, plan), plan.counts_E, plan


def combine(ops: Ops, y_RD: Array, routing: Routing, plan: DispatchPlan) -> Array:
    """Sum of each token's rows weighted by their gates, (T, D) in the type of y."""
    return ops.unpermute(y_RD, routing.weight_N, plan)


def soft_dispatch(ops: Ops, x_TD: Array, routing: SoftRouting) -> tuple[Array, Array]:
    """Compute rows in expert order, each a weighted mean of the tokens of one sequence.

    Returns: (x_RD, counts_E), where every expert gets its slots from all sequences.
    """
    batch, sequence, slots = routing.dispatch_BSR.shape
    experts, width = routing.num_experts, x_TD.shape[1]
    x_BSD = ops.reshape(x_TD, (batch, sequence, width))
    dispatch_BRS = ops.transpose(ops.cast(routing.dispatch_BSR, ops.dtype(x_TD)), (0, 2, 1))
    x_BEPD = ops.reshape(ops.matmul(dispatch_BRS, x_BSD), (batch, experts, -1, width))
    x_RD = ops.reshape(ops.transpose(x_BEPD, (1, 0, 2, 3)), (-1, width))
    return x_RD, ops.arange(experts) * ops.index(0) + ops.index(batch * slots // experts)


def soft_combine(ops: Ops, y_RD: Array, routing: SoftRouting) -> Array:
    """Each token's weighted mean of its sequence's slots, (T, D) in the type of y."""
    batch, _, slots = routing.dispatch_BSR.shape
    experts, width = routing.num_experts, y_RD.shape[1]
    y_EBPD = ops.reshape(y_RD, (experts, batch, -1, width))
    y_BRD = ops.reshape(ops.transpose(y_EBPD, (1, 0, 2, 3)), (batch, slots, width))
    y_BSD = ops.matmul(ops.cast(routing.combine_BSR, ops.dtype(y_RD)), y_BRD)
    return ops.reshape(y_BSD, (-1, width))
