"""A mixture of experts from tokens to tokens, or its experts alone, as one node of autograd.

It keeps the input, the hidden states before the activation, gates and indices; everything else is computed again in the
backward pass. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeport.backends.torch.cuda.layout import Layout
from moeport.backends.torch.cuda.stages import stages_of

Context = Any


def expert_block(
    x: Tensor, gate_N: Tensor | None, w_in: Tensor, w_out: Tensor, layout: Layout, activation: str, form: str
) -> Tensor:
    """The outputs of the experts, weighted and summed for each token; or for each row, if x has rows.

    Args:
        x: tokens (T, D), or rows (R, D) if the layout has no order.
        gate_N: gate of each assignment; None: all are 1.
        w_in: (E, 2F, D) for swiglu, gate first; (E, F, D) for gelu; in the type of x.
        w_out: (E, D, F) in the type of x.
        layout: of the rows.
        activation: swiglu or gelu.
        form: of `stages.FORMS`.

    Returns: the shape and type of x; 0 where no expert served.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:  # such as tensors without memory
        return _operation(x, gate_N, w_in, w_out, *_tensors(layout), layout.whole, layout.choices, activation, form)[0]
    return ExpertBlock.apply(x, gate_N, w_in, w_out, *layout, activation, form)


class ExpertBlock(torch.autograd.Function):
    """`expert_block`; its arguments are those, with the layout's fields one by one."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, gate_N: Tensor | None, w_in: Tensor, w_out: Tensor, *rest: Any) -> Tensor:
        """The result."""
        *fields, activation, form = rest
        layout = Layout(*fields)
        x = x.contiguous()
        y, hidden = _forward(x, gate_N, w_in, w_out, layout, activation, form)
        ctx.save_for_backward(x, gate_N, w_in, w_out, hidden, *_tensors(layout))
        ctx.whole, ctx.choices, ctx.activation, ctx.form = layout.whole, layout.choices, activation, form
        return y

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gates, w_in and w_out."""
        x, gate_N, w_in, w_out, hidden, ends_E, order_R, position_N = ctx.saved_tensors
        layout = Layout(ends_E, ctx.whole, order_R, position_N, ctx.choices)
        found = _backward(grad, x, gate_N, w_in, w_out, hidden, layout, ctx.activation, ctx.form)
        return (*found, *(None for _ in (*layout, ctx.activation, ctx.form)))


def _tensors(layout: Layout) -> tuple[Tensor | None, ...]:
    return layout.ends_E, layout.order_R, layout.position_N


def _forward(
    x: Tensor, gate_N: Tensor | None, w_in: Tensor, w_out: Tensor, layout: Layout, activation: str, form: str
) -> tuple[Tensor, Tensor]:
    """The result, and the hidden states before the activation."""
    stages = stages_of(form)
    hidden, activated = stages.up(x, w_in, layout, activation)
    y_RD = stages.down(activated, w_out, layout)
    del activated
    return stages.combine(y_RD, gate_N, layout), hidden


def _backward(
    grad: Tensor,
    x: Tensor,
    gate_N: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    hidden: Tensor,
    layout: Layout,
    activation: str,
    form: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, gates, w_in and w_out."""
    stages = stages_of(form)
    grad_hidden, grad_gate_N, grad_w_out = stages.down_backward(
        grad.contiguous(), gate_N, w_out, hidden, layout, activation
    )
    grad_RD, grad_w_in = stages.up_backward(grad_hidden, x, w_in, layout)
    return stages.combine(grad_RD, None, layout), grad_gate_N, grad_w_in, grad_w_out


@torch.library.custom_op("moeport::expert_block", mutates_args=())
def _operation(
    x: Tensor,
    gate_N: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    ends_E: Tensor,
    order_R: Tensor | None,
    position_N: Tensor | None,
    whole: bool,
    choices: int,
    activation: str,
    form: str,
) -> tuple[Tensor, Tensor]:
    """`ExpertBlock` as one operation of a compiled graph. Returns: (result, hidden states before the activation)."""
    layout = Layout(ends_E, whole, order_R, position_N, choices)
    y, hidden = _forward(x.contiguous(), gate_N, w_in, w_out, layout, activation, form)
    return y, hidden


@_operation.register_fake
def _(
    x: Tensor,
    gate_N: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    ends_E: Tensor,
    order_R: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if order_R is None else order_R.shape[0]
    return x.new_empty(x.shape), x.new_empty(rows, w_in.shape[1])


@torch.library.custom_op("moeport::expert_block_backward", mutates_args=())
def _backward_operation(
    grad: Tensor,
    x: Tensor,
    gate_N: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    hidden: Tensor,
    indices: list[Tensor],
    whole: bool,
    choices: int,
    activation: str,
    form: str,
) -> list[Tensor]:
    """Gradients of x, w_in and w_out, and of the gates if there are any."""
    ends_E, order_R, position_N = indices if len(indices) > 1 else (indices[0], None, None)
    layout = Layout(ends_E, whole, order_R, position_N, choices)
    found = _backward(grad, x.contiguous(), gate_N, w_in, w_out, hidden, layout, activation, form)
    grad_x, grad_gate_N, grad_w_in, grad_w_out = found
    return [grad_x, grad_w_in, grad_w_out, *([] if grad_gate_N is None else [grad_gate_N])]


@_backward_operation.register_fake
def _(grad: Tensor, x: Tensor, gate_N: Tensor | None, w_in: Tensor, w_out: Tensor, *_: Any) -> list[Tensor]:
    gates = [] if gate_N is None else [gate_N.new_empty(gate_N.shape)]
    return [x.new_empty(x.shape), torch.empty_like(w_in), torch.empty_like(w_out), *gates]


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate_N, w_in, w_out, *indices, ctx.whole, ctx.choices, ctx.activation, ctx.form = inputs
    ctx.save_for_backward(x, gate_N, w_in, w_out, output[1], *indices)


def _run_backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *arrays, ends_E, order_R, position_N = ctx.saved_tensors
    indices = [ends_E] if order_R is None else [ends_E, order_R, position_N]
    options = ctx.whole, ctx.choices, ctx.activation, ctx.form
    grad_x, grad_w_in, grad_w_out, *gates = _backward_operation(grad, *arrays, indices, *options)
    return (grad_x, gates[0] if gates else None, grad_w_in, grad_w_out, *(None,) * 7)


_operation.register_autograd(_run_backward, setup_context=_save)
