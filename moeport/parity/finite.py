"""What is not finite in a record: a NaN, or an infinity that is no mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeport.parity.recording import Kind, TensorRecord

MASKED = ("parameter", "input", "score", "state")
"""Kinds of tensors in which minus infinity is a mask, not a fault."""
MASKING = ("where", "arithmetic", None)
"""Operations of which the same is true."""

STEPPED = ("training gradient", "moment", "update", "state", "second step")
"""Kinds of tensors of the optimiser steps."""
GRADED = ("loss", "gradient", *(kind for kind in STEPPED if kind != "state"))
"""Kinds of tensors in which no infinity is a mask, whatever computed them."""
FORWARD = "forward pass of step 1"
PLACES = {
    "gradient": "backward pass of step 1",
    **dict.fromkeys(STEPPED, "optimiser step 1"),
    "second step": "optimiser step 2",
}
"""Where a kind of tensor was computed; other kinds in the forward pass."""


@dataclass(frozen=True)
class NonFinite:
    """A tensor with a NaN or an infinity."""

    name: str
    kind: Kind
    op: str | None
    value: str
    """`NaN`, or `infinity` if it has no NaN."""
    count: int
    """Number of entries that are not finite; 0 if only statistics are known."""
    size: int
    order: int = 0
    """Number of tensors that were looked at before it in its pass."""
    place: str = ""
    """The pass, such as `forward pass of step 1`."""

    def __str__(self) -> str:
        owner = self.name.partition(":")[2]
        labels = {"parameter": f"parameter {owner}", "update": f"optimiser update of {owner}"}
        labels |= dict.fromkeys(("gradient", "training gradient"), f"gradient of {owner}")
        entries = f"{self.count} of {self.size} entries" if self.count else ""
        details = filter(None, (self.op and f"operation {self.op}", self.place, entries))
        return f"{self.value} in {labels.get(self.kind, self.name)} ({', '.join(details)})"


def non_finite_in(record: TensorRecord) -> NonFinite | None:
    """What is not finite in the kept entries or the statistics of a record; None if that is nothing but a mask."""
    if not record.is_float:
        return None
    values, known = record.values, record.statistics
    whole = values is not None and (record.keep == "full" or not np.isfinite(values).all())
    if values is None or not whole:
        values = np.asarray([known.mean] if known and not np.isfinite(known.rms) else [])
    odd = values[~np.isfinite(values)]
    if not odd.size or (_may_mask(record) and bool((odd == -np.inf).all())):
        return None
    value = "NaN" if np.isnan(odd).any() else "infinity"
    return NonFinite(record.name, record.kind, record.op, value, int(odd.size) if whole else 0, record.size)


def _may_mask(record: TensorRecord) -> bool:
    return record.kind not in GRADED and (record.kind in MASKED or record.op in MASKING)
