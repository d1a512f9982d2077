"""Kernels with hand-written gradients.

Each is held against the default composition of `moeport.core.ops.Ops`, forward and backward, by the conformance suite.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Context = Any

CROSS_ENTROPY_ROWS = 256
"""Rows of logits handled at a time on the CPU, so that one block in float32 stays in cache."""


class Permute(torch.autograd.Function):
    """Copy each token to the rows of its K assignments; the gradient gathers instead of scattering."""

    @staticmethod
    def forward(ctx: Context, x_TD: Tensor, token_R: Tensor, position_N: Tensor, choices: int) -> Tensor:
        """Rows x[token]."""
        ctx.save_for_backward(position_N)
        ctx.choices = choices
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Context, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        """Sum of each token's K rows."""
        (position_N,) = ctx.saved_tensors
        grad_TKD = grad_RD.index_select(0, position_N).unflatten(0, (-1, ctx.choices))
        return grad_TKD.sum(1), None, None, None


class Unpermute(torch.autograd.Function):
    """Weighted sum of each token's K rows; forward and gradient gather, so both are deterministic on any device."""

    @staticmethod
    def forward(
        ctx: Context, y_RD: Tensor, weight_N: Tensor, order_R: Tensor, position_N: Tensor, choices: int
    ) -> Tensor:
        """sum_k weight[t, k] * y[row of (t, k)]."""
        weight_TK = weight_N.unflatten(0, (-1, choices))
        y_TKD = y_RD.index_select(0, position_N).unflatten(0, (-1, choices))
        ctx.save_for_backward(y_RD, weight_N, order_R, position_N)
        ctx.choices = choices
        return torch.bmm(weight_TK.to(y_RD.dtype).unsqueeze(1), y_TKD).squeeze(1)

    @staticmethod
    def backward(ctx: Context, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows and gates."""
        y_RD, weight_N, order_R, position_N = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, order_R // ctx.choices)
        grad_weight_R = (grad_RD * y_RD).sum(-1, dtype=weight_N.dtype)
        weight_R = weight_N.index_select(0, order_R).to(y_RD.dtype)
        return grad_RD * weight_R.unsqueeze(1), grad_weight_R.index_select(0, position_N), None, None, None


class GroupedMLP(torch.autograd.Function):
    """All experts on their contiguous slices of rows, in one autograd node.

    Weight gradients are written straight into the stacked buffers: no slices are concatenated. The work is that of a
    dense block of R rows, 6 R D F multiply-adds forward (SwiGLU) and twice that backward.
    """

    @staticmethod
    def forward(ctx: Context, x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts: list[int], activation: str) -> Tensor:
        """Rows of expert 0, then of expert 1, ...; the rest stays 0."""
        hidden = x_RD.new_empty(sum(counts), w_in.shape[1])
        out = torch.empty_like(x_RD)
        for expert, start, end in _slices(counts):
            torch.mm(x_RD[start:end], w_in[expert].t(), out=hidden[start:end])
        activated = _activate(hidden, activation)
        for expert, start, end in _slices(counts):
            torch.mm(activated[start:end], w_out[expert].t(), out=out[start:end])
        out[sum(counts) :] = 0
        ctx.save_for_backward(x_RD, hidden, w_in, w_out)
        ctx.counts, ctx.activation = counts, activation
        return out

    @staticmethod
    def backward(ctx: Context, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows and both weights; experts without rows get zeros."""
        x_RD, hidden, w_in, w_out = ctx.saved_tensors
        counts = ctx.counts
        grad_RD = grad_RD.contiguous()
        activated = _activate(hidden, ctx.activation)
        grad_activated = torch.empty_like(activated)
        grad_w_out, grad_w_in = torch.empty_like(w_out), torch.empty_like(w_in)
        for expert, start, end in _slices(counts):
            torch.mm(grad_RD[start:end], w_out[expert], out=grad_activated[start:end])
            torch.mm(grad_RD[start:end].t(), activated[start:end], out=grad_w_out[expert])
        grad_hidden = _activate_backward(grad_activated, hidden, ctx.activation)
        grad_x = torch.empty_like(x_RD)
        for expert, start, end in _slices(counts):
            torch.mm(grad_hidden[start:end], w_in[expert], out=grad_x[start:end])
            torch.mm(grad_hidden[start:end].t(), x_RD[start:end], out=grad_w_in[expert])
        for expert, count in enumerate(counts):
            if not count:
                grad_w_out[expert], grad_w_in[expert] = 0, 0
        grad_x[sum(counts) :] = 0
        return grad_x, grad_w_in, grad_w_out, None, None


def _slices(counts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of every expert with rows."""
    slices, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            slices.append((expert, start, start + count))
        start += count
    return slices


def _activate(hidden: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(hidden)
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _activate_backward(grad: Tensor, hidden: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, hidden)
    gate, up = hidden.chunk(2, -1)
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_up = grad_hidden.chunk(2, -1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return grad_hidden


class CrossEntropy(torch.autograd.Function):
    """Negative log-likelihood and log-partition of each row, in float32 at least.

    On the CPU rows go through in blocks that stay in cache; only the logits, the log-partition and, in the backward
    pass, one gradient of the logits' type are ever whole.
    """

    @staticmethod
    def forward(ctx: Context, logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
        """(nll_T, logsumexp_T)."""
        log_partition_T = torch.cat([torch.logsumexp(_accurate(rows), -1) for rows in _row_blocks(logits_TV)])
        picked_T = _accurate(logits_TV.gather(1, target_T.unsqueeze(1)).squeeze(1))
        ctx.save_for_backward(logits_TV, target_T, log_partition_T)
        return log_partition_T - picked_T, log_partition_T

    @staticmethod
    def backward(ctx: Context, grad_nll_T: Tensor, grad_log_partition_T: Tensor) -> tuple[Tensor, None]:
        """(grad_nll + grad_logsumexp) softmax - grad_nll one_hot(target)."""
        logits_TV, target_T, log_partition_T = ctx.saved_tensors
        grad = torch.empty_like(logits_TV)
        columns = (grad_nll_T + grad_log_partition_T).unsqueeze(1)
        blocks = zip(*map(_row_blocks, (logits_TV, log_partition_T.unsqueeze(1), columns, grad)), strict=True)
        for logits, log_partition, scale, out in blocks:
            out.copy_(torch.exp_(_accurate(logits) - log_partition).mul_(scale))
        grad.scatter_add_(1, target_T.unsqueeze(1), -grad_nll_T.unsqueeze(1).to(grad.dtype))
        return grad, None


def _row_blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(CROSS_ENTROPY_ROWS) if x.device.type == "cpu" else (x,)


def _accurate(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
