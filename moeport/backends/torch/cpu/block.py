"""A layer's experts on a CPU, from tokens to tokens, as one node of autograd.

Of each expert in turn the rows are gathered, multiplied, activated and multiplied again. What is needed for one expert
only lies in buffers that all experts share, so it stays in cache, and no new memory has to be mapped for it, as it is
for every large array of a step. The hidden states before the activation are kept for the backward pass, which gathers
the rows and computes the activation again. The gradient of a gate is the product of an activation and its incoming
gradient, so the experts' outputs are not kept either.

In the backward pass the gates multiply what is of the tokens' width: the rows whose products are gradients of weights,
and the sums over each token's rows. The hidden states, which are wider, are left without them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moeport.backends.torch.cpu.rows import Rows, lay_out, unit_for
from moeport.backends.torch.kernels import Context, activate, grouped_mlp_of_operations
from moeport.core.dispatch_plan import DispatchPlan

BLOCK = 2**20
"""Hidden states that are activated at a time: 4 MiB in float32, which all passes over them find in cache. With fewer
there would be more parallel regions, which are slow where another program takes a core away.
"""

SMALL = 2**16
"""Up to this many hidden states of all experts, starting operations takes longer than what buffers save."""


class RoutedMLP(torch.autograd.Function):
    """`routed_mlp` of `Ops`, where tokens choose experts."""

    @staticmethod
    def forward(
        ctx: Context, x_TD: Tensor, weight_N: Tensor, w_in: Tensor, w_out: Tensor, plan: DispatchPlan, activation: str
    ) -> Tensor:
        """The weighted sums of the experts' outputs, (T, D)."""
        y_TD, rows, hidden = RoutedMLP.compute(x_TD, weight_N, w_in, w_out, plan, activation)
        ctx.save_for_backward(x_TD, weight_N, w_in, w_out, hidden)
        ctx.plan, ctx.rows, ctx.activation = plan, rows, activation
        return y_TD

    @staticmethod
    def compute(
        x_TD: Tensor, weight_N: Tensor, w_in: Tensor, w_out: Tensor, plan: DispatchPlan, activation: str
    ) -> tuple[Tensor, Rows, Tensor]:
        """The sums, the rows, and the hidden states before the activation; called by itself without gradients."""
        rows = lay_out(plan, weight_N, unit_for(len(weight_N), w_in.shape[0], x_TD.dtype))
        hidden, y_PD = _forward(x_TD, w_in, w_out, rows, activation)
        return _summed(y_PD, rows, weight_N, plan), rows, hidden

    @staticmethod
    def backward(ctx: Context, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of tokens, gates and both weights."""
        x_TD, weight_N, w_in, w_out, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients are differentiated in turn
            given = (x_TD, weight_N, w_in, w_out)
            wanted = [x for x in given if x.requires_grad]
            y_TD = of_operations(*given, ctx.plan, ctx.activation)
            found = iter(torch.autograd.grad(y_TD, wanted, grad_TD, create_graph=True, materialize_grads=True))
            return (*(next(found) if x.requires_grad else None for x in given), None, None)
        grad_PD, grad_gate_P, grad_w_in, grad_w_out = _backward(
            grad_TD.contiguous(), x_TD, w_in, w_out, hidden, ctx.rows, ctx.activation
        )
        grad_x = _summed(grad_PD, ctx.rows, weight_N, ctx.plan)
        return (
            grad_x,
            grad_gate_P.index_select(0, ctx.rows.place_N).to(weight_N.dtype),
            grad_w_in,
            grad_w_out,
            None,
            None,
        )


def of_operations(
    x_TD: Tensor, weight_N: Tensor, w_in: Tensor, w_out: Tensor, plan: DispatchPlan, activation: str
) -> Tensor:
    """The same from differentiable operations, for second derivatives."""
    arrays: Any = plan
    counts, choices = arrays.counts_E.tolist(), plan.choices_per_token or 1
    y_RD = grouped_mlp_of_operations(x_TD.index_select(0, arrays.token_R), w_in, w_out, counts, activation)
    y_TKD = y_RD.index_select(0, arrays.position_N).unflatten(0, (-1, choices))
    return (y_TKD * weight_N.to(y_RD.dtype).view(-1, choices, 1)).sum(1)


def _forward(x_TD: Tensor, w_in: Tensor, w_out: Tensor, rows: Rows, activation: str) -> tuple[Tensor, Tensor]:
    """Hidden states before the activation (P, 2F or F), and outputs (P + 1, D), of which the last is 0."""
    if 0 < rows.total * w_in.shape[1] <= SMALL:
        return _forward_of_few(x_TD, w_in, w_out, rows, activation)
    width, longest = x_TD.shape[1], rows.longest
    hidden, y_PD = x_TD.new_empty(rows.total, w_in.shape[1]), x_TD.new_empty(rows.total + 1, width)
    x_nD, activated_nF = x_TD.new_empty(longest, width), x_TD.new_empty(longest, w_out.shape[2])
    for expert, start, end in rows.slices:
        count = end - start
        torch.index_select(x_TD, 0, rows.token_P[start:end], out=x_nD[:count])
        torch.mm(x_nD[:count], w_in[expert].t(), out=hidden[start:end])
        _activate(hidden[start:end], activated_nF[:count], activation)
        torch.mm(activated_nF[:count], w_out[expert].t(), out=y_PD[start:end])
    y_PD[rows.total] = 0
    return hidden, y_PD


def _forward_of_few(x_TD: Tensor, w_in: Tensor, w_out: Tensor, rows: Rows, activation: str) -> tuple[Tensor, Tensor]:
    """The same in fewer operations: all rows are gathered, activated and laid down at once."""
    experts, counts = zip(*((expert, end - start) for expert, start, end in rows.slices), strict=True)
    x_PD = x_TD.index_select(0, rows.token_P) if len(x_TD) > 1 else x_TD.expand(rows.total, -1)
    pairs = zip(experts, x_PD.split(counts), strict=True)
    hidden = torch.cat([torch.mm(x_nD, w_in[expert].t()) for expert, x_nD in pairs])
    pairs = zip(experts, activate(hidden, activation).split(counts), strict=True)
    y_PD = [torch.mm(activated_nF, w_out[expert].t()) for expert, activated_nF in pairs]
    return hidden, torch.cat([*y_PD, x_TD.new_zeros(1, x_TD.shape[1])])


def _backward(
    grad_TD: Tensor, x_TD: Tensor, w_in: Tensor, w_out: Tensor, hidden: Tensor, rows: Rows, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows without their gates (P + 1, D) and of gates (P + 1), of which the last is 0, and of w_in and
    w_out.
    """
    width, longest = x_TD.shape[1], rows.longest
    grad_PD, grad_gate_P = x_TD.new_empty(rows.total + 1, width), rows.gate_P.new_empty(rows.total + 1)
    grad_w_in, grad_w_out = torch.empty_like(w_in), torch.empty_like(w_out)
    gate_P1 = rows.gate_P.to(x_TD.dtype).unsqueeze(1)
    rows_nD = x_TD.new_empty(longest, width)  # first of the gradient, then of the tokens
    activated_nF, grad_nF = (x_TD.new_empty(longest, w_out.shape[2]) for _ in range(2))
    grad_hidden = x_TD.new_empty(longest, w_in.shape[1])
    for expert, start, end in rows.slices:
        here, own = slice(start, end), slice(0, end - start)
        torch.index_select(grad_TD, 0, rows.token_P[here], out=rows_nD[own])
        torch.mm(rows_nD[own], w_out[expert], out=grad_nF[own])
        _activate_backward(
            hidden[here], activated_nF[own], grad_nF[own], grad_hidden[own], grad_gate_P[here], activation
        )
        torch.mm(rows_nD[own].mul_(gate_P1[here]).t(), activated_nF[own], out=grad_w_out[expert])
        torch.mm(grad_hidden[own], w_in[expert], out=grad_PD[here])
        torch.index_select(x_TD, 0, rows.token_P[here], out=rows_nD[own])
        rows_nD[own].mul_(gate_P1[here])
        torch.mm(grad_hidden[own].t(), rows_nD[own], out=grad_w_in[expert])
    for expert in set(range(w_in.shape[0])).difference(expert for expert, *_ in rows.slices):
        grad_w_in[expert], grad_w_out[expert] = 0, 0
    grad_PD[rows.total], grad_gate_P[rows.total] = 0, 0
    return grad_PD, grad_gate_P, grad_w_in, grad_w_out


def _activate(hidden: Tensor, out: Tensor, activation: str) -> None:
    """Write the activation of some rows to `out`."""
    for block in _blocks(hidden):
        if activation == "gelu":
            torch.ops.aten.gelu.out(hidden[block], out=out[block])
        else:
            gate, up = hidden[block].chunk(2, -1)
            torch.ops.aten.silu.out(gate, out=out[block])
            out[block].mul_(up)


def _activate_backward(
    hidden: Tensor, activated: Tensor, grad: Tensor, grad_hidden: Tensor, grad_gate_n: Tensor, activation: str
) -> None:
    """Recompute the activation of some rows, and apply its gradient and that of the gates.

    Args:
        hidden: before the activation.
        activated: gets the activation.
        grad: gradient of the activation, without gates; is overwritten.
        grad_hidden: gets the gradient of `hidden`, without gates.
        grad_gate_n: gets the gradient of the gates.
        activation: swiglu or gelu.
    """
    for block in _blocks(hidden):
        act, incoming = activated[block], grad[block]
        if activation == "gelu":
            torch.ops.aten.gelu.out(hidden[block], out=act)
        else:
            gate, up = hidden[block].chunk(2, -1)
            grad_gate, grad_up = grad_hidden[block].chunk(2, -1)
            torch.ops.aten.silu.out(gate, out=grad_gate)  # for a moment
            torch.mul(grad_gate, up, out=act)
        torch.sum(incoming * act, -1, dtype=grad_gate_n.dtype, out=grad_gate_n[block])
        if activation == "gelu":
            torch.ops.aten.gelu_backward.grad_input(incoming, hidden[block], grad_input=grad_hidden[block])
        else:
            torch.mul(incoming, grad_gate, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(incoming.mul_(up), gate, grad_input=grad_gate)


def _blocks(hidden: Tensor) -> list[slice]:
    """Ranges of rows that stay in cache."""
    rows = max(1, BLOCK // hidden.shape[1])
    return [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]


def _summed(rows_PD: Tensor, rows: Rows, weight_N: Tensor, plan: DispatchPlan) -> Tensor:
    """The weighted sum of each token's rows: one pass, gathered and added in order."""
    place_TK = rows.place_N.view(plan.num_tokens, -1)
    weight_TK = weight_N.to(rows_PD.dtype).view_as(place_TK)
    return F.embedding_bag(place_TK, rows_PD, mode="sum", per_sample_weights=weight_TK)
