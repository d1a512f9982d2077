"""What a mixture-of-experts layer reports beside its output. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from typing import NamedTuple

from moeport.core.array import Array


class MoEMetrics(NamedTuple):
    """What a layer reports beside its output."""

    load_balance: Array
    """Load-balancing loss, not yet weighted; a scalar. 0 if its coefficient is 0."""
    router_z: Array
    """Router z-loss, not yet weighted; a scalar. 0 if its coefficient is 0."""
    own_loss: Array
    """Loss that only this router has, weighted; a scalar. 0 for most routers."""
    chosen_E: Array
    """Assignments the router chose each expert for, before any drop."""
    served_E: Array
    """Assignments each expert computed."""
    capacity: Array
    """Assignments an expert may serve, a scalar; 0 where there is no limit."""
    positions_2P: Array
    """Assignments chosen, and dropped, in each range of positions of a sequence; 0 where there is no limit."""
    affinity_3E: Array
    """What an estimated capacity follows from, see `affinity_statistics`; 0 for other policies."""
