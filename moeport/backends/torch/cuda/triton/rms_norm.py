"""RMSNorm in one pass forward and one backward, in Triton. Not run on hardware.

For N rows of width D in a type of b bytes, forward reads and writes 2 N D b bytes, backward 3 N D b (x and the gradient
in, the gradient of x out), and besides them only the weight, 4 N bytes of scales, and 4 P D of partial sums for at most
P = 512 programs. The arithmetic, about 15 N D operations both ways, takes less time than these bytes on any GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeport.backends.torch.cuda.triton.rows import rows_of_tile, warps

MAX_WIDTH = 8192
"""Widest row that a program keeps in registers: at twice this width, ptxas spills some for compute capability 9.0."""
PARTS = 512
"""Most partial sums of the weight's gradient. They do not depend on the device, and neither does the order of sums."""


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, num_rows, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(y_ptr + at, (x * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    part_ptr,
    num_rows,
    num_tiles,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With n = x rstd and p = grad n: dx = rstd (grad w - n mean(p w)), and a partial sum of p over the rows."""
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < num_rows)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        normal = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += grad * normal
        scaled = grad * weight[None, :]
        mean = tl.sum(scaled * normal, axis=1)[:, None] / D
        tl.store(grad_x_ptr + at, (rstd * (scaled - normal * mean)).to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(part_ptr + tl.program_id(0) * D + column, tl.sum(total, axis=0), mask=column < D)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The normalised x, in its type. Args: x (..., D) in bfloat16 or float32; weight (D,) of any float type."""
        x = x.contiguous()
        width, num_rows = x.shape[-1], x.numel() // x.shape[-1]
        block = triton.next_power_of_2(width)
        rows = rows_of_tile(block)
        y, rstd = torch.empty_like(x), torch.empty(num_rows, dtype=torch.float32, device=x.device)
        forward_kernel[(triton.cdiv(num_rows, rows),)](
            x, weight, y, rstd, num_rows, eps, width, rows, block, num_warps=warps(rows * block)
        )
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the weight; each sum of the latter has one order, so it is deterministic."""
        x, weight, rstd = ctx.saved_tensors
        grad = grad.contiguous()
        width, num_rows = x.shape[-1], rstd.shape[0]
        block = triton.next_power_of_2(width)
        rows = rows_of_tile(block)
        tiles = triton.cdiv(num_rows, rows)
        programs = min(tiles, PARTS)
        grad_x, part = torch.empty_like(x), torch.empty(programs, width, dtype=torch.float32, device=x.device)
        backward_kernel[(programs,)](
            grad, x, weight, rstd, grad_x, part, num_rows, tiles, width, rows, block, num_warps=warps(rows * block)
        )
        return grad_x, part.sum(0).to(weight.dtype), None
