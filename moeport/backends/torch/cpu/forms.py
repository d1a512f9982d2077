"""Forms of the experts' two products on rows sorted by expert, from differentiable operations of torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moeport.backends.torch.cpu.rows import unit_for


def grouped_mm(x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts_E: Tensor, activation: str) -> Tensor:
    """By torch's grouped product; rows that no expert serves are left out and then 0."""
    served = int(counts_E.sum())
    ends = counts_E.cumsum(0, dtype=torch.int32)
    hidden = F.grouped_mm(x_RD[:served], w_in.transpose(1, 2), offs=ends)
    y = F.grouped_mm(_activated(hidden, activation), w_out.transpose(1, 2), offs=ends)
    return F.pad(y, (0, 0, 0, len(x_RD) - served)) if served < len(x_RD) else y


def padded_bmm(x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts_E: Tensor, activation: str) -> Tensor:
    """By one batched product over all experts, each with as many rows as the one that has the most.

    That number is rounded up as in `moeport.backends.torch.cpu.rows`.
    """
    experts, served = len(counts_E), int(counts_E.sum())
    unit = unit_for(served, experts, x_RD.dtype)
    most = -(-int(counts_E.max()) // unit) * unit
    first_E = torch.arange(experts) * most - (counts_E.cumsum(0) - counts_E)
    place_R = torch.arange(served) + first_E.repeat_interleave(counts_E)
    padded = x_RD.new_zeros(experts * most, x_RD.shape[1]).index_copy(0, place_R, x_RD[:served])
    hidden = torch.bmm(padded.view(experts, most, -1), w_in.transpose(1, 2))
    y = torch.bmm(_activated(hidden, activation), w_out.transpose(1, 2)).flatten(0, 1).index_select(0, place_R)
    return F.pad(y, (0, 0, 0, len(x_RD) - served)) if served < len(x_RD) else y


def _activated(hidden: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(hidden)
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up
