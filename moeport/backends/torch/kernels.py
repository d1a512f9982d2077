"""Kernels with hand-written gradients.

The conformance suite checks each against the default composition of `moeport.core.ops.Ops`, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Context = Any


class Permute(torch.autograd.Function):
    """Copy each token to the rows of its K assignments; the gradient gathers instead of scattering."""

    @staticmethod
    def forward(ctx: Context, x_TD: Tensor, token_R: Tensor, position_N: Tensor, choices: int) -> Tensor:
        """The rows x[token]."""
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
    dense block on R rows: 6 R D F multiply-adds forward (SwiGLU) and twice that backward.
    """

    @staticmethod
    def forward(ctx: Context, x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts: list[int], activation: str) -> Tensor:
        """Outputs for the rows of expert 0, then of expert 1, ...; the remaining rows are 0."""
        hidden = x_RD.new_empty(sum(counts), w_in.shape[1])
        out = _grouped_forward(x_RD, w_in, w_out, counts, activation, hidden)
        ctx.save_for_backward(x_RD, hidden, w_in, w_out)
        ctx.counts, ctx.activation = counts, activation
        return out

    @staticmethod
    def backward(ctx: Context, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows and both weights; experts without rows get zeros."""
        x_RD, hidden, w_in, w_out = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients are differentiated in turn
            wanted = [x for x in (x_RD, w_in, w_out) if x.requires_grad]
            y_RD = grouped_mlp_of_operations(x_RD, w_in, w_out, ctx.counts, ctx.activation)
            found = iter(torch.autograd.grad(y_RD, wanted, grad_RD, create_graph=True, materialize_grads=True))
            return (*(next(found) if x.requires_grad else None for x in (x_RD, w_in, w_out)), None, None)
        return (*_grouped_backward(grad_RD, x_RD, hidden, w_in, w_out, ctx.counts, ctx.activation), None, None)


def grouped_mlp_of_operations(x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts: list[int], activation: str) -> Tensor:
    """The same from differentiable operations, for second derivatives and torch.func."""
    outputs = [x_RD.new_zeros(0, x_RD.shape[1])]
    for expert, start, end in _slices(counts):
        hidden = F.linear(x_RD[start:end], w_in[expert])
        if activation == "gelu":
            activated = F.gelu(hidden)
        else:
            gate, up = hidden.chunk(2, -1)
            activated = F.silu(gate) * up
        outputs.append(F.linear(activated, w_out[expert]))
    return torch.cat([*outputs, torch.zeros_like(x_RD[sum(counts) :])])


def _grouped_forward(
    x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts: list[int], activation: str, hidden: Tensor
) -> Tensor:
    """The outputs; writes the hidden states, before the activation, to `hidden`."""
    out = torch.empty_like(x_RD)
    for expert, start, end in _slices(counts):
        torch.mm(x_RD[start:end], w_in[expert].t(), out=hidden[start:end])
    activated = activate(hidden, activation)
    for expert, start, end in _slices(counts):
        torch.mm(activated[start:end], w_out[expert].t(), out=out[start:end])
    out[sum(counts) :] = 0
    return out


def _grouped_backward(
    grad_RD: Tensor, x_RD: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, counts: list[int], activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, w_in and w_out."""
    grad_RD = grad_RD.contiguous()
    activated = activate(hidden, activation)
    grad_activated = torch.empty_like(activated)
    grad_w_out, grad_w_in = torch.empty_like(w_out), torch.empty_like(w_in)
    for expert, start, end in _slices(counts):
        torch.mm(grad_RD[start:end], w_out[expert], out=grad_activated[start:end])
        torch.mm(grad_RD[start:end].t(), activated[start:end], out=grad_w_out[expert])
    grad_hidden = activate_backward(grad_activated, hidden, activation)
    grad_x = torch.empty_like(x_RD)
    for expert, start, end in _slices(counts):
        torch.mm(grad_hidden[start:end], w_in[expert], out=grad_x[start:end])
        torch.mm(grad_hidden[start:end].t(), x_RD[start:end], out=grad_w_in[expert])
    for expert, count in enumerate(counts):
        if not count:
            grad_w_out[expert], grad_w_in[expert] = 0, 0
    grad_x[sum(counts) :] = 0
    return grad_x, grad_w_in, grad_w_out


@torch.library.custom_op("moeport::grouped_mlp", mutates_args=())
def grouped_mlp_operation(
    x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts_E: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """`GroupedMLP` as one operation of a compiled graph, which reads the rows per expert in each call.

    Returns: (outputs, hidden states before the activation, of as many rows).
    """
    counts = counts_E.tolist()
    hidden = x_RD.new_zeros(x_RD.shape[0], w_in.shape[1])
    return _grouped_forward(x_RD.contiguous(), w_in, w_out, counts, activation, hidden), hidden


@torch.library.custom_op("moeport::grouped_mlp_backward", mutates_args=())
def _grouped_backward_operation(
    grad_RD: Tensor, x_RD: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, counts_E: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _grouped_backward(grad_RD, x_RD.contiguous(), hidden, w_in, w_out, counts_E.tolist(), activation)


@grouped_mlp_operation.register_fake
def _(x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts_E: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), x_RD.new_empty(x_RD.shape[0], w_in.shape[1])


@_grouped_backward_operation.register_fake
def _(
    grad_RD: Tensor, x_RD: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, counts_E: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), torch.empty_like(w_in), torch.empty_like(w_out)


def _save_for_grouped_backward(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_RD, w_in, w_out, counts_E, ctx.activation = inputs
    ctx.save_for_backward(x_RD, output[1], w_in, w_out, counts_E)


def _run_grouped_backward(ctx: Context, grad_RD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_grouped_backward_operation(grad_RD, *ctx.saved_tensors, ctx.activation), None, None)


grouped_mlp_operation.register_autograd(_run_grouped_backward, setup_context=_save_for_grouped_backward)


def _slices(counts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of every expert with rows."""
    slices, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            slices.append((expert, start, start + count))
        start += count
    return slices


def activate(hidden: Tensor, activation: str) -> Tensor:
    """The activation of hidden states (R, 2F) for swiglu, (R, F) for gelu; returns (R, F)."""
    if activation == "gelu":
        return F.gelu(hidden)
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate).mul_(up)


def activate_backward(grad: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """The gradient of `hidden`, from that of its activation, which may be overwritten."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, hidden)
    gate, up = hidden.chunk(2, -1)
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_up = grad_hidden.chunk(2, -1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return grad_hidden


class RMSNorm(torch.autograd.Function):
    """x * rstd * weight with rstd = (mean(x^2) + eps)^-1/2, in few passes over memory; computed in float32 or wider."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The normalised x, in the type of x."""
        y, rstd = RMSNorm.compute(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def compute(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The normalised x and rstd. Without gradients it is called by itself: a node costs more than one row does.

        torch.compile of PyTorch 2.11 loses the gradient of a result that was made in place, or cast to its own type.
        """
        y = _accurate(x)
        rstd = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = y * rstd
        result = normal * weight if torch.compiler.is_compiling() else normal.mul_(weight)
        return (result if result.dtype == x.dtype else result.to(x.dtype)), rstd

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x rstd and p = grad n: dx = rstd (grad w - n mean(p w)), dw = sum(p)."""
        x, weight, rstd = ctx.saved_tensors
        grad_y, normal = _accurate(grad), _accurate(x) * rstd
        product = (grad_y * normal).flatten(0, -2)
        mean = torch.mv(product, weight).div_(x.shape[-1]).view_as(rstd)
        grad_x = (grad_y * weight).sub_(normal.mul_(mean)).mul_(rstd)
        return grad_x.to(x.dtype), product.sum(0), None


class LinearCrossEntropy(torch.autograd.Function):
    """Output projection, cross entropy and z-loss over blocks of rows; only one block of logits exists at a time.

    The loss is a mean with one incoming gradient, so the gradients of hidden states and projection are computed in
    the forward pass, while a block's logits exist, and only scaled in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Context, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, z_weight: float, block_rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, cross entropy, z-loss), means over rows; and the cross entropy of each row, (T,)."""
        rows = x_TD.shape[0]
        weight = weight_VD.to(x_TD.dtype)
        wants_gradient = any(ctx.needs_input_grad)
        if wants_gradient:
            grad_x, grad_weight = torch.empty_like(x_TD), torch.zeros_like(weight_VD)
        nll, z = (torch.zeros((), dtype=_accurate(x_TD[:0]).dtype, device=x_TD.device) for _ in range(2))
        nll_T = nll.new_empty(rows)
        for start in range(0, rows, block_rows):
            block = slice(start, start + block_rows)
            x, target_n1 = x_TD[block], target_T[block].unsqueeze(1)
            logits = _accurate(torch.mm(x, weight.t()))
            log_partition_n1 = torch.logsumexp(logits, -1, keepdim=True)
            nll_n1 = log_partition_n1 - logits.gather(1, target_n1)
            nll_T[block] = nll_n1.squeeze(1)
            nll += nll_n1.sum()
            z += log_partition_n1.square().sum()
            if not wants_gradient:
                continue
            grad = logits.sub_(log_partition_n1).exp_()
            if z_weight:
                grad.mul_(log_partition_n1.mul_(2 * z_weight).add_(1))
            grad.scatter_add_(1, target_n1, grad.new_full((), -1.0).expand_as(target_n1))
            grad = grad.to(x.dtype)
            torch.mm(grad, weight, out=grad_x[block])
            if grad_weight.dtype == x.dtype:
                grad_weight.addmm_(grad.t(), x)
            else:
                grad_weight += torch.mm(grad.t(), x)
        if wants_gradient:
            ctx.save_for_backward(grad_x, grad_weight)
            ctx.rows = rows
        nll, z = nll / rows, z / rows
        ctx.mark_non_differentiable(nll, z, nll_T)
        return nll + z_weight * z, nll, z, nll_T

    @staticmethod
    def backward(ctx: Context, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass, scaled."""
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad / ctx.rows
        return grad_x * scale, grad_weight * scale, None, None, None


def _accurate(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
