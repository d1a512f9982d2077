"""How the rows of a grouped block belong to experts and tokens. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """Rows sorted by expert; those behind the last expert's belong to nobody, and what they hold is never read."""

    ends_E: Tensor
    """The row behind the last one of each expert, int32 as torch's grouped product takes it."""
    whole: bool
    """Whether every row is known to belong to an expert."""
    order_R: Tensor | None = None
    """Assignment of each row; None: the input has the rows themselves, not the tokens."""
    position_N: Tensor | None = None
    """Row of each assignment: the inverse of order_R."""
    choices: int = 1
    """K, assignments per token: the token of an assignment is its number // K."""
