"""Where a dispatch sends every assignment. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from dataclasses import dataclass

from moeport.core.array import Array


@dataclass(frozen=True)
class DispatchPlan:
    """Where every assignment goes. R = N rows; unrouted ones come last."""

    order_R: Array
    """Assignment of each row."""
    position_N: Array
    """Row of each assignment: the inverse of order_R."""
    token_R: Array
    """Token of each row."""
    counts_E: Array
    """Rows per expert; rows after the last counted one are not served."""
    num_tokens: int
    """T."""
    choices_per_token: int | None
    """K; None if experts chose the tokens, in which case assignments are not in token order."""
    serves_every_row: bool = False
    """Whether every row is served, whatever the data: counts_E then sums to R. Known from the config alone, so that a
    kernel may leave out masks without looking at the device; False where a row may be unrouted.
    """
