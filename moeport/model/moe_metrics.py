"""What a mixture-of-experts layer reports besides its output. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.core.positions import drops_by_position
from moeport.core.routing import Routing, SoftRouting, Topology, of_node
from moeport.model.loss_terms import CHOSEN_EXPERT, CHOSEN_TOKEN


class MoEMetrics(NamedTuple):
    """What a layer reports besides its output. None: it is off, and nothing was computed for it; it counts as 0."""

    load_balance: Array | None
    """Load-balancing loss, unweighted; a scalar. None if its coefficient is 0."""
    router_z: Array | None
    """Router z-loss, unweighted; a scalar. None if its coefficient is 0."""
    own_loss: Array | None
    """Loss specific to this router, weighted; a scalar. None for most routers."""
    chosen_E: Array
    """Assignments to each expert, before drops."""
    served_E: Array
    """Assignments each expert computed."""
    capacity: Array | None
    """Capacity: the most assignments an expert may serve, a scalar. None if there is no limit."""
    positions_2P: Array | None
    """Assignments chosen, and dropped, in each range of positions of a sequence. None if there is no limit."""
    affinity_4E: Array | None
    """Statistics that a capacity is estimated from, see `affinity_statistics`. None for other policies."""
    measured: dict[str, Array]
    """What is measured only for metrics; see `measurements`."""

    @property
    def has_losses(self) -> bool:
        """Whether any of its losses is on."""
        return any(loss is not None for loss in (self.load_balance, self.router_z, self.own_loss))

    def filled(self, ops: Ops, kind: str) -> MoEMetrics:
        """The same with zeros of a type in place of what is None; one range of positions if there is no limit."""
        shapes = {"positions_2P": (2, 1), "affinity_4E": (4, self.chosen_E.shape[0])}
        absent = [name for name in self._fields if getattr(self, name) is None]
        zeros: dict[str, Any] = {name: ops.zeros(shapes.get(name, ()), kind) for name in absent}
        return self._replace(**zeros)


def mean_over_layers(ops: Ops, values: Sequence[Array | None], kind: str) -> Array:
    """The mean of a scalar over all layers, in which a layer that has none counts as 0."""
    total = ops.zeros((), kind)
    for value in values:
        if value is not None:
            total = total + value * ops.constant_like(1.0 / len(values), value)
    return total


def stacked_layers(ops: Ops, values: Sequence[Array | None], shape: tuple[int, ...], kind: str) -> Array:
    """A value of every layer along a new first dimension.

    Args:
        ops: the backend's operations.
        values: by layer; of all or of none.
        shape: of a layer's zeros, where none has a value.
        kind: their type.
    """
    present = [ops.reshape(value, (1, *value.shape)) for value in values if value is not None]
    return ops.concat(present, axis=0) if present else ops.zeros((len(values), *shape), kind)


def choices(chosen: Routing) -> dict[str, Array]:
    """What the router chose, for the trainer to count: expert and token of each assignment, as in `Routing`."""
    token = {} if chosen.token_N is None else {CHOSEN_TOKEN: chosen.token_N}
    return {CHOSEN_EXPERT: chosen.expert_N, **token}


LOCAL_SHARE = "local_share"
"""Metric of routers that simulate nodes, and of jobs of several nodes."""


def measurements(
    ops: Ops, chosen: Routing | SoftRouting, chosen_E: Array, nodes: int | None, topology: Topology
) -> dict[str, Array]:
    """What a layer measures only for metrics, by name of the metric; no output and no gradient depends on it.

    Each value is an array of the same shape in all layers, usually a scalar. The row of the metric in
    `moeport.training.metrics_table` says how it is reduced.

    Args:
        ops: the backend's operations.
        chosen: what the router chose.
        chosen_E: assignments to each expert.
        nodes: number of nodes that the router simulates; None: those of the cluster.
        topology: where the tokens and the experts are.
    """
    measured: dict[str, Array] = {}
    if isinstance(chosen, Routing) and (nodes or topology.job_nodes > 1):
        measured[LOCAL_SHARE] = local_share(ops, chosen, chosen_E, nodes, topology)
    return measured


def local_share(ops: Ops, chosen: Routing, chosen_E: Array, nodes: int | None, topology: Topology) -> Array:
    """The share of the choices that fall on experts of their token's own node; a scalar, 0 without choices.

    Args: as of `measurements`.
    """
    kind, experts = ops.dtype(chosen.logits_TE), chosen.num_experts
    if nodes is None:
        first, end = of_node(topology.node, topology.nodes, experts)
        local = ops.sum(ops.cast(chosen_E[first:end], kind))
    else:
        token_N, choices = chosen.token_N, chosen.expert_N.shape[0]
        if token_N is None:
            token_N = ops.arange(choices) // ops.index(choices // chosen.num_tokens)
        node_N = token_N * ops.index(nodes) // ops.index(chosen.num_tokens)
        expert_node_N = chosen.expert_N * ops.index(nodes) // ops.index(experts)  # `nodes` for an unrouted one
        local = ops.sum(ops.cast(node_N == expert_node_N, kind))
    total = ops.sum(ops.cast(chosen_E, kind))
    one = ops.constant_like(1.0, total)
    return local / ops.where(total > one, total, one)


def capacity_metrics(
    ops: Ops, chosen: Routing, served: Routing, capacity: int | Array | None, num_sequences: int
) -> dict[str, Array | None]:
    """The capacity metrics by name; no output and no gradient depends on them.

    Args:
        ops: the backend's operations.
        chosen: what the router chose.
        served: what remains after drops; `chosen` itself where nothing can be dropped.
        capacity: the result of `expert_capacity`; None: no limit.
        num_sequences: sequences of equal length that make up the tokens.
    """
    if served is chosen:
        return dict(NO_CAPACITY)
    rows = None
    if isinstance(capacity, int):
        zero = ops.zeros((), ops.dtype(chosen.logits_TE))
        rows = zero + ops.constant_like(capacity, zero)
    elif capacity is not None:
        rows = ops.reshape(capacity, ())
    return NO_CAPACITY | {"capacity": rows, "positions_2P": drops_by_position(ops, chosen, served, num_sequences)}


FILL_RATE = "fill_rate"
"""Metric of capacity policy `round`."""


def fill_rate(ops: Ops, kept: Routing, filled: Routing) -> Array:
    """Rows of experts that tokens fill which did not choose them, per chosen assignment; a scalar.

    Args:
        ops: the backend's operations.
        kept: what is left of the choices.
        filled: the same with what fills.
    """
    chosen = kept.expert_N.shape[0]
    fills_N = filled.expert_N[chosen:] < ops.index(filled.num_experts)
    return ops.sum(ops.cast(fills_N, ops.dtype(kept.logits_TE))) * ops.constant_like(1.0 / chosen, kept.logits_TE)


NO_CAPACITY: dict[str, Array | None] = {"capacity": None, "positions_2P": None, "affinity_4E": None}
"""The capacity metrics where there is no capacity."""
