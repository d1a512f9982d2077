"""The training loss and its parts. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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
    measured: Mapping[str, Array]
    """What the MoE layers measure for metrics alone, see `moeport.model.moe_metrics.measurements`: by name, with the
    passes of the batch and the layers before the dimensions of a layer's own value."""

    def flat(self) -> list[Array]:
        """All arrays, in an order that depends on the names in `measured` alone."""
        return [*(getattr(self, name) for name in FIELDS), *self.measured.values()]

    @classmethod
    def from_flat(cls, arrays: Iterable[Array], measured: Iterable[str]) -> LossTerms:
        """The terms from what `flat` gave, and the names in `measured`."""
        values = iter(arrays)
        terms = {name: next(values) for name in FIELDS}
        return cls(**terms, measured=dict(zip(measured, values, strict=True)))

    def map(self, function: Callable[[Array], Any]) -> LossTerms:
        """The terms with a function applied to each array."""
        return LossTerms.from_flat(map(function, self.flat()), self.measured)


FIELDS = LossTerms._fields[:-1]
"""Names of the terms that every model has."""

COUNTS = ("chosen_LE", "served_LE", "positions_L2P", "affinity_L3E")
"""Loss terms that add up over the passes of a batch."""
MEANS = ("cross_entropy", "load_balance", "router_z", "output_z")
"""Loss terms of which the mean over the passes is taken."""
