"""The training loss and its parts. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from moeport.core.array import Array


class LossTerms(NamedTuple):
    """The training loss and its parts; scalars, except those with a shape suffix."""

    loss: Array
    """What is differentiated: cross entropy plus weighted auxiliary losses."""
    cross_entropy: Array
    """Mean negative log-likelihood in nats per target."""
    load_balance: Array
    """Load-balancing loss, mean over the layers, unweighted; 1 is balanced."""
    router_z: Array
    """Router z-loss, mean over the layers, unweighted."""
    output_z: Array
    """Output z-loss, unweighted."""
    chosen_LE: Array
    """Assignments to each expert before drops, one row per MoE layer; sub-layers have rows of their own."""
    served_LE: Array
    """Assignments each expert computed."""
    capacity_L: Array
    """Capacity: the most assignments an expert may serve; 0 if there is no limit."""
    positions_L2P: Array
    """Assignments chosen, and dropped, in each of P ranges of positions of a sequence; 0 if there is no limit."""
    affinity_L4E: Array
    """Statistics that capacities are estimated from, see `moeport.model.capacity`; 0 if there are none."""
    measured: Mapping[str, Array]
    """What the MoE layers measure only for metrics, by name; see `moeport.model.moe_metrics.measurements`. The
    dimensions of one layer's value are preceded by the passes of the batch and the layers."""

    def without_kept(self) -> tuple[LossTerms, dict[str, Array]]:
        """The terms that are reduced over micro-batches, and what is kept beside them, by name; see `KEPT`."""
        kept = {name: value for name, value in self.measured.items() if name in KEPT}
        rest = {name: value for name, value in self.measured.items() if name not in KEPT}
        return self._replace(measured=rest), kept

    def flat(self) -> list[Array]:
        """All arrays, in an order that depends only on the names in `measured`."""
        return [*(getattr(self, name) for name in FIELDS), *self.measured.values()]

    @classmethod
    def from_flat(cls, arrays: Iterable[Array], measured: Iterable[str]) -> LossTerms:
        """The inverse of `flat`, given the names in `measured`."""
        values = iter(arrays)
        terms = {name: next(values) for name in FIELDS}
        return cls(**terms, measured=dict(zip(measured, values, strict=True)))

    def map(self, function: Callable[[Array], Any]) -> LossTerms:
        """The terms with a function applied to each array."""
        return LossTerms.from_flat(map(function, self.flat()), self.measured)


CHOSEN_EXPERT, CHOSEN_TOKEN = "chosen_expert", "chosen_token"
"""Expert and token of each assignment before drops, as in `Routing`; the token only where experts choose tokens."""
SEQUENCE_NATS = "sequence_nats"
"""Weighted cross entropy of each sequence, summed over its targets; only where targets have weights."""
KEPT = (CHOSEN_EXPERT, CHOSEN_TOKEN, SEQUENCE_NATS)
"""What is among the measurements for the trainer to count on the host: it has no row in the table of metrics."""
FIELDS = LossTerms._fields[:-1]
"""Names of the terms that every model has."""

COUNTS = ("chosen_LE", "served_LE", "positions_L2P", "affinity_L4E")
"""Loss terms that add up over the passes of a batch."""
MEANS = ("cross_entropy", "load_balance", "router_z", "output_z")
"""Loss terms that are averaged over the passes of a batch."""
