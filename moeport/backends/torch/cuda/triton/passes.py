"""The passes of an expert block as Triton kernels: one program for each row or token, no atomics. Not run on hardware.

`moeport.backends.torch.cuda.passes` says what each function does. Bytes that each moves, in elements of the compute
type (K assignments per token, R = T K rows):

    gather               R D read, R D written
    activate (SwiGLU)    2 R F read, R F written
    activate_backward    3 R F read, 3 R F written
    combine              R D read, T D written
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeport.backends.torch.cuda.layout import Layout
from moeport.backends.torch.cuda.triton.activation import derivatives

WARPS = 4
SWEEPERS = 256
"""Programs that look for rows to clear."""


@triton.jit
def gather_kernel(x, order, out, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(order + row).to(tl.int64) // K
    for start in tl.static_range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        tl.store(out + row * D + col, tl.load(x + token * D + col, mask=col < D), mask=col < D)


@triton.jit
def activated(h, row, col, F: tl.constexpr, GATED: tl.constexpr):
    """`derivatives` at some columns of a row."""
    WIDTH: tl.constexpr = 2 * F if GATED else F
    first = tl.load(h + row * WIDTH + col, mask=col < F, other=0.0).to(tl.float32)
    second = first
    if GATED:
        second = tl.load(h + row * WIDTH + F + col, mask=col < F, other=0.0).to(tl.float32)
    return derivatives(first, second, GATED)


@triton.jit
def activate_kernel(h, out, F: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, F, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value, _, _ = activated(h, row, col, F, GATED)
        tl.store(out + row * F + col, value.to(out.dtype.element_ty), mask=col < F)


@triton.jit
def activate_backward_kernel(
    h,
    grad,
    gate,
    order,
    ends,
    grad_h,
    scaled,
    grad_gate,
    E: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    served = True
    if not WHOLE:
        served = row < tl.load(ends + E - 1)
    weight = 1.0
    if WEIGHTED:
        assignment = tl.load(order + row).to(tl.int64)
        weight = tl.load(gate + assignment).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if served:
        for start in tl.static_range(0, F, BLOCK):
            col = start + tl.arange(0, BLOCK)
            value, by_gate, by_up = activated(h, row, col, F, GATED)
            d = tl.load(grad + row * F + col, mask=col < F, other=0.0).to(tl.float32)
            total += d * value
            tl.store(scaled + row * F + col, (weight * value).to(scaled.dtype.element_ty), mask=col < F)
            d = d * weight
            if GATED:
                to = grad_h + row * 2 * F
                tl.store(to + F + col, (d * by_up).to(grad_h.dtype.element_ty), mask=col < F)
            else:
                to = grad_h + row * F
            tl.store(to + col, (d * by_gate).to(grad_h.dtype.element_ty), mask=col < F)
    if WEIGHTED:
        tl.store(grad_gate + assignment, tl.sum(total).to(grad_gate.dtype.element_ty))


@triton.jit
def combine_kernel(
    y,
    position,
    gate,
    ends,
    out,
    E: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            row = tl.load(position + token * K + k).to(tl.int64)
            seen = col < D
            if not WHOLE:
                seen = seen & (row < tl.load(ends + E - 1))
            value = tl.load(y + row * D + col, mask=seen, other=0.0).to(tl.float32)
            if WEIGHTED:
                value = value * tl.load(gate + token * K + k).to(tl.float32)
            total += value
        tl.store(out + token * D + col, total.to(out.dtype.element_ty), mask=col < D)


@triton.jit
def clear_rows_kernel(y, ends, rows, E: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), y.dtype.element_ty)
    first = tl.load(ends + E - 1).to(tl.int64) + tl.program_id(0)
    for row in range(first, rows, tl.num_programs(0)):
        for start in tl.static_range(0, D, BLOCK):
            col = start + tl.arange(0, BLOCK)
            tl.store(y + row * D + col, zero, mask=col < D)


@triton.jit
def clear_unused_kernel(grad, ends, size, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if tl.load(ends + expert) == begin:
        zero = tl.zeros((BLOCK,), grad.dtype.element_ty)
        for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
            col = start + tl.arange(0, BLOCK)
            tl.store(grad + expert.to(tl.int64) * size + col, zero, mask=col < size)


def gather(x_TD: Tensor, layout: Layout) -> Tensor:
    """As `passes.gather`."""
    order = layout.order_R
    if order is None:
        return x_TD
    width = x_TD.shape[1]
    out = x_TD.new_empty(order.shape[0], width)
    gather_kernel[(order.shape[0],)](x_TD, order, out, width, layout.choices, block(width), num_warps=WARPS)
    return out


def activate(hidden: Tensor, activation: str) -> Tensor:
    """As `passes.activate`."""
    gated = activation == "swiglu"
    width = hidden.shape[1] // (2 if gated else 1)
    out = hidden.new_empty(hidden.shape[0], width)
    activate_kernel[(hidden.shape[0],)](hidden, out, width, gated, block(width, 1024), num_warps=WARPS)
    return out


def activate_backward(
    hidden: Tensor, grad: Tensor, gate_N: Tensor | None, layout: Layout, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `passes.activate_backward`."""
    rows, width = grad.shape
    grad_hidden, scaled = torch.empty_like(hidden), torch.empty_like(grad)
    grad_gate_N = None if gate_N is None else torch.empty_like(gate_N)
    activate_backward_kernel[(rows,)](
        hidden,
        grad,
        *_or(hidden, gate_N, layout.order_R, layout.ends_E),
        grad_hidden,
        scaled,
        *_or(hidden, grad_gate_N),
        layout.ends_E.shape[0],
        width,
        activation == "swiglu",
        gate_N is not None,
        layout.whole,
        block(width, 1024),
        num_warps=WARPS,
    )
    return grad_hidden, scaled, grad_gate_N


def combine(y_RD: Tensor, gate_N: Tensor | None, layout: Layout) -> Tensor:
    """As `passes.combine`."""
    (rows, width), experts, position = y_RD.shape, layout.ends_E.shape[0], layout.position_N
    if position is None:
        if not layout.whole:
            clear_rows_kernel[(SWEEPERS,)](y_RD, layout.ends_E, rows, experts, width, block(width), num_warps=WARPS)
        return y_RD
    tokens = position.shape[0] // layout.choices
    out = y_RD.new_empty(tokens, width)
    combine_kernel[(tokens,)](
        y_RD,
        position,
        *_or(y_RD, gate_N),
        layout.ends_E,
        out,
        experts,
        width,
        layout.choices,
        gate_N is not None,
        layout.whole,
        block(width, 1024),
        num_warps=WARPS,
    )
    return out


def clear_unused(grad_E: Tensor, layout: Layout) -> Tensor:
    """As `passes.clear_unused`."""
    experts, size = grad_E.shape[0], grad_E[0].numel()
    clear_unused_kernel[(experts, 16)](grad_E, layout.ends_E, size, 2048, num_warps=WARPS)
    return grad_E


def block(width: int, most: int = 2048) -> int:
    """Columns that a program holds at a time."""
    return min(triton.next_power_of_2(width), most)


def _or(stand_in: Tensor, *tensors: Tensor | None) -> list[Any]:
    """The tensors, and another one, which no kernel reads, in place of those that are missing."""
    return [stand_in if tensor is None else tensor for tensor in tensors]
