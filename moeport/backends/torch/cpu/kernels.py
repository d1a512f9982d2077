"""The table of fused kernels for CPUs: how each kernel of `Ops` is served, and what is beyond it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeport.backends.torch.cpu import forms
from moeport.backends.torch.cpu.block import RoutedMLP
from moeport.backends.torch.limits import tokens_choose
from moeport.backends.torch.ops import TorchOps
from moeport.backends.trial import Candidate, serves_all
from moeport.core.dispatch_plan import DispatchPlan
from moeport.facts import BACKENDS

Form = Callable[[Tensor, Tensor, Tensor, Tensor, str], Tensor]
"""Takes rows, both weights, rows per expert and the activation."""


def routed_slices(
    ops: TorchOps,
    x_TD: Tensor,
    weight_N: Tensor,
    plan: DispatchPlan,
    w_in: Tensor,
    w_out_EDF: Tensor,
    activation: str,
) -> Tensor:
    """From tokens to tokens in one node, expert by expert."""
    arguments = x_TD, weight_N, w_in.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype), plan, activation
    return RoutedMLP.apply(*arguments) if torch.is_grad_enabled() else RoutedMLP.compute(*arguments)[0]


def grouped_slices(
    ops: TorchOps, x_RD: Tensor, w_in: Tensor, w_out_EDF: Tensor, counts_E: Tensor, activation: str
) -> Tensor:
    """The same node, for rows that are tokens with one choice and a gate of 1, and sorted already."""
    rows: Any = torch.arange(len(x_RD))
    counts: Any = counts_E
    plan = DispatchPlan(rows, rows, rows, counts, len(x_RD), 1)
    return routed_slices(ops, x_RD, x_RD.new_ones(len(x_RD)), plan, w_in, w_out_EDF, activation)


def routed_by(
    form: Form,
    ops: TorchOps,
    x_TD: Tensor,
    weight_N: Tensor,
    plan: DispatchPlan,
    w_in: Tensor,
    w_out_EDF: Tensor,
    activation: str,
) -> Tensor:
    """Gathered, multiplied in some form, weighted and summed."""
    return ops.unpermute(
        grouped_by(form, ops, ops.permute(x_TD, plan), w_in, w_out_EDF, _counts(plan), activation), weight_N, plan
    )


def grouped_by(
    form: Form, ops: TorchOps, x_RD: Tensor, w_in: Tensor, w_out_EDF: Tensor, counts_E: Tensor, activation: str
) -> Tensor:
    """The products in some form; without rows to serve, the composition."""
    if not int(counts_E.sum()):
        return TorchOps.grouped_mlp(ops, x_RD, w_in, w_out_EDF, counts_E, activation)
    return form(x_RD, w_in.to(x_RD.dtype), w_out_EDF.to(x_RD.dtype), counts_E, activation)


def _counts(plan: DispatchPlan) -> Tensor:
    arrays: Any = plan
    counts: Tensor = arrays.counts_E
    return counts


FUNCTIONS: Mapping[tuple[str, str], tuple[Callable[..., Any], Callable[..., str | None]]] = {
    ("routed_mlp", "slices"): (routed_slices, tokens_choose),
    ("routed_mlp", "grouped_mm"): (partial(routed_by, forms.grouped_mm), tokens_choose),
    ("routed_mlp", "padded_bmm"): (partial(routed_by, forms.padded_bmm), tokens_choose),
    ("grouped_mlp", "slices"): (grouped_slices, serves_all),
    ("grouped_mlp", "grouped_mm"): (partial(grouped_by, forms.grouped_mm), serves_all),
    ("grouped_mlp", "padded_bmm"): (partial(grouped_by, forms.padded_bmm), serves_all),
}
"""By kernel and name in the table of facts: how it is served, and what it cannot serve."""

CANDIDATES = tuple(
    Candidate(fact, *FUNCTIONS[fact.kernel, fact.name], is_smooth=True, is_traceable=False)
    for fact in BACKENDS["torch"].fused_on("cpu")
)
"""In the order in which they are tried."""
