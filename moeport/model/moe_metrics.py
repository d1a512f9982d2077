"""What a mixture-of-experts layer reports besides its output. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.positions import drops_by_position, position_ranges
from moeport.core.routing import Routing, SoftRouting


class MoEMetrics(NamedTuple):
    """What a layer reports besides its output."""

    load_balance: Array
    """Load-balancing loss, unweighted; a scalar. 0 if its coefficient is 0."""
    router_z: Array
    """Router z-loss, unweighted; a scalar. 0 if its coefficient is 0."""
    own_loss: Array
    """Loss specific to this router, weighted; a scalar. 0 for most routers."""
    chosen_E: Array
    """Assignments to each expert, before drops."""
    served_E: Array
    """Assignments each expert computed."""
    capacity: Array
    """Capacity: the most assignments an expert may serve, a scalar; 0 if there is no limit."""
    positions_2P: Array
    """Assignments chosen, and dropped, in each range of positions of a sequence; 0 if there is no limit."""
    affinity_3E: Array
    """Statistics that a capacity is estimated from, see `affinity_statistics`; 0 for other policies."""
    measured: Mapping[str, Array]
    """What is measured only for metrics; see `measurements`."""


def measurements(ops: Ops, chosen: Routing | SoftRouting) -> dict[str, Array]:
    """What a layer measures only for metrics, by name of the metric; no output and no gradient depends on it.

    Each value is an array of the same shape in all layers, usually a scalar. The row of the metric in
    `moeport.training.metrics_table` says how it is reduced. There are none so far.

    Args:
        ops: the backend's operations.
        chosen: what the router chose.
    """
    measured: dict[str, Array] = {}
    return measured


def capacity_metrics(
    ops: Ops, chosen: Routing, served: Routing, capacity: int | Array | None, num_sequences: int
) -> dict[str, Array]:
    """The capacity metrics by name; no output and no gradient depends on them.

    Args:
        ops: the backend's operations.
        chosen: what the router chose.
        served: what remains after drops.
        capacity: the result of `expert_capacity`; None: no limit.
        num_sequences: sequences of equal length that make up the tokens.
    """
    found = no_capacity_metrics(ops, chosen, num_sequences)
    if isinstance(capacity, int):
        found["capacity"] = found["capacity"] + ops.constant_like(capacity, found["capacity"])
    elif capacity is not None:
        found["capacity"] = ops.reshape(capacity, ())
    if capacity is not None:
        found["positions_2P"] = drops_by_position(ops, chosen, served, num_sequences)
    return found


def no_capacity_metrics(ops: Ops, chosen: Routing | SoftRouting, num_sequences: int) -> dict[str, Array]:
    """The capacity metrics when there is no capacity: zeros by name. Arguments as in `capacity_metrics`."""
    kind, tokens = ops.dtype(chosen.logits_TE), chosen.logits_TE.shape[0]
    return {
        "capacity": ops.zeros((), kind),
        "positions_2P": ops.zeros((2, position_ranges(tokens // num_sequences)), kind),
        "affinity_3E": ops.zeros((3, chosen.num_experts), kind),
    }
