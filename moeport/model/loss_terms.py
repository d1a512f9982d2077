"""The training loss and its parts. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from typing import NamedTuple

from moeport.core.array import Array


class LossTerms(NamedTuple):
    """The training loss and its parts; scalars but for those with a shape."""

    loss: Array
    """What is differentiated: cross entropy plus weighted auxiliary losses."""
    cross_entropy: Array
    """Mean negative log-likelihood in nats a target."""
    load_balance: Array
    """Load-balancing loss, mean over the layers, not weighted; 1 is balanced."""
    router_z: Array
    """Router z-loss, mean over the layers, not weighted."""
    output_z: Array
    """Output z-loss, not weighted."""
    chosen_LE: Array
    """Assignments the router chose each expert for, a row for each MoE layer, sub-layers one by one."""
    served_LE: Array
    """Assignments each expert computed."""
    capacity_L: Array
    """Assignments an expert may serve; 0 where there is no limit."""
    positions_L2P: Array
    """Assignments chosen, and dropped, in each of P ranges of positions of a sequence; 0 where there is no limit."""
    affinity_L3E: Array
    """What estimated capacities follow from, see `moeport.model.capacity`; 0 where there are none."""


COUNTS = ("chosen_LE", "served_LE", "positions_L2P", "affinity_L3E")
"""Loss terms that add up over the passes of a batch."""
MEANS = ("cross_entropy", "load_balance", "router_z", "output_z")
"""Loss terms of which the mean over the passes is taken."""
