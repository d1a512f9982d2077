"""The rows of experts as a CPU computes them: each expert's rows follow one another, in numbers that come again.

oneDNN, which multiplies in bfloat16, prepares code for every new shape of a product, which can take longer than the
product. The rows of an expert are a new number in every step. Rounded up to a multiple of a unit they are one of a few
numbers, whose code is there. The rows that this adds repeat one of the same expert, with a gate of 0, and nothing reads
their results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeport.core.dispatch_plan import DispatchPlan

LARGEST_UNIT = 64
"""Of rounding."""
SHARE = 16
"""The unit is at most about this fraction of the mean number of rows, so that little is computed in vain."""


def unit_for(rows: int, experts: int, dtype: torch.dtype) -> int:
    """The unit to whose multiples the rows of an expert are rounded up: 1 for products that prepare nothing."""
    if dtype not in (torch.bfloat16, torch.float16):
        return 1
    return min(LARGEST_UNIT, 1 << max(0, (rows // (experts * SHARE)).bit_length() - 1))


@dataclass(frozen=True)
class Rows:
    """Where rows come from and go to. P rows: those that are served, and those that rounding adds."""

    slices: list[tuple[int, int, int]]
    """(expert, first row, end) of every expert with rows."""
    total: int
    """P."""
    token_P: Tensor
    gate_P: Tensor
    """0 for rows that rounding adds; of the type of the gates."""
    place_N: Tensor
    """Row of each assignment; P if it is not served."""

    @property
    def longest(self) -> int:
        """The most rows of an expert."""
        return max((end - start for _, start, end in self.slices), default=0)


def lay_out(plan: DispatchPlan, weight_N: Tensor, unit: int) -> Rows:
    """The rows of a plan, rounded up to multiples of a unit."""
    arrays: Any = plan
    counts = arrays.counts_E.tolist()
    served = sum(counts)
    padded = [-(-count // unit) * unit for count in counts]
    slices, total = [], 0
    for expert, length in enumerate(padded):
        if length:
            slices.append((expert, total, total + length))
        total += length
    if total == served:
        gate_P = weight_N.index_select(0, arrays.order_R[:served])
        place_N = arrays.position_N if served == len(weight_N) else arrays.position_N.clamp(max=served)
        return Rows(slices, served, arrays.token_R[:served], gate_P, place_N)
    counts_E, padded_E = arrays.counts_E, torch.tensor(padded)
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    last_E = counts_E.cumsum(0) - 1
    plain_P = torch.arange(total) - shift_E.repeat_interleave(padded_E)
    end_P = last_E.repeat_interleave(padded_E)
    row_P = torch.minimum(plain_P, end_P)
    gate_P = weight_N.index_select(0, arrays.order_R.index_select(0, row_P)).masked_fill_(plain_P > end_P, 0)
    place_R = torch.full((len(weight_N),), total)
    place_R[:served] = torch.arange(served) + shift_E.repeat_interleave(counts_E)
    return Rows(
        slices, total, arrays.token_R.index_select(0, row_P), gate_P, place_R.index_select(0, arrays.position_N)
    )
