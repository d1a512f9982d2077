"""What an expert block does between its products, in plain torch. `triton.passes` has the same functions.

Rows behind the last expert's hold undefined numbers, which may be NaN: nothing here lets one into a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeport.backends.torch import kernels
from moeport.backends.torch.cuda.layout import Layout
from moeport.backends.torch.kernels import activate as activate


def gather(x_TD: Tensor, layout: Layout) -> Tensor:
    """The token of each row, (R, D); x itself if it has the rows."""
    if layout.order_R is None:
        return x_TD
    return x_TD.index_select(0, layout.order_R // layout.choices)


def activate_backward(
    hidden: Tensor, grad: Tensor, gate_N: Tensor | None, layout: Layout, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activation again, with the gates and the gradients that only it makes known.

    A gate multiplies an expert's output w_out a, so its gradient is a^T (w_out^T dy): it needs the activation a (F) and
    `grad`, but no output (D).

    Args:
        hidden: the states before the activation.
        grad: w_out^T dy for each row, (R, F), without its gate.
        gate_N: gate of each assignment; None: all are 1.
        layout: of the rows.
        activation: swiglu or gelu.

    Returns: the gradient of `hidden`; the activation times the gate (R, F); the gradient of the gates in their type.
    """
    activated = activate(hidden, activation)
    if gate_N is None:
        return kernels.activate_backward(grad.clone(), hidden, activation), activated, None
    grad_gate_R = (grad * activated).sum(-1, dtype=_wide(hidden))
    if not layout.whole:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        grad_gate_R = torch.where(rows < layout.ends_E[-1], grad_gate_R, 0)
    gate_R1 = gate_N.index_select(0, layout.order_R).to(hidden.dtype).unsqueeze(1)
    grad_gate_N = grad_gate_R.to(gate_N.dtype).index_select(0, layout.position_N)
    return kernels.activate_backward(grad * gate_R1, hidden, activation), activated.mul_(gate_R1), grad_gate_N


def combine(y_RD: Tensor, gate_N: Tensor | None, layout: Layout) -> Tensor:
    """The sum of each token's rows, weighted by their gates, (T, D).

    If the rows are the result themselves, those behind the last expert's are set to 0 in place.
    """
    if layout.position_N is None:
        return y_RD if layout.whole else _cleared(y_RD, layout.ends_E)
    y_ND = y_RD.index_select(0, layout.position_N)
    if not layout.whole:
        y_ND.masked_fill_((layout.position_N >= layout.ends_E[-1]).unsqueeze(1), 0)
    y_TKD = y_ND.unflatten(0, (-1, layout.choices))
    if gate_N is None:
        return y_TKD.sum(1)
    gate_T1K = gate_N.to(y_RD.dtype).view(-1, 1, layout.choices)
    return torch.bmm(gate_T1K, y_TKD).squeeze(1)


def clear_unused(grad_E: Tensor, layout: Layout) -> Tensor:
    """Set the weight gradients of experts without rows to 0, in place.

    A grouped product may leave there whatever was in memory.
    """
    starts_E = torch.cat((layout.ends_E.new_zeros(1), layout.ends_E[:-1]))
    return grad_E.masked_fill_((layout.ends_E == starts_E)[:, None, None], 0)


def _cleared(y_RD: Tensor, ends_E: Tensor) -> Tensor:
    rows = torch.arange(y_RD.shape[0], device=y_RD.device)
    return y_RD.masked_fill_((rows >= ends_E[-1]).unsqueeze(1), 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
