"""Rotary embedding in one pass, forward and backward, in Triton. Not run on hardware.

For B S tokens of H heads of width A in a type of b bytes, each way reads and writes 2 B S H A b bytes, and the angles
once per token from the cache (4 S A bytes in float32). The arithmetic, 3 B S H A operations, takes less time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeport.backends.torch.cuda.triton.rows import rows_of_tile, warps


@triton.jit(do_not_specialize=["period"])
def rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    sign,
    period,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The pairs (i, i + A/2) of some heads of a token, turned by the angle of its position; backwards if sign is -1.

    The angles repeat after `period` tokens: a sequence, or the whole batch where positions differ between sequences.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, BLOCK)
    angle = (token % period) * 2 * HALF + pair
    cos = tl.load(cos_ptr + angle, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=pair < HALF, other=0.0).to(tl.float32)[None, :] * sign
    inside = (head < H)[:, None] & (pair < HALF)[None, :]
    at = (token * H + head)[:, None] * 2 * HALF + pair[None, :]
    low = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    tl.store(y_ptr + at, (low * cos - high * sin).to(kind), mask=inside)
    tl.store(y_ptr + at + HALF, (high * cos + low * sin).to(kind), mask=inside)


class Rope(torch.autograd.Function):
    """Rotate-half pairing, computed in float32. The gradient is the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
        """Arguments and result as of `moeport.core.ops.Ops.rope`; x in bfloat16 or float32."""
        ctx.save_for_backward(cos_SA, sin_SA)
        return _rotated(x_BSHA, cos_SA, sin_SA, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_BSHA: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x; the angles have none."""
        cos_SA, sin_SA = ctx.saved_tensors
        return _rotated(grad_BSHA, cos_SA, sin_SA, -1.0), None, None


def _rotated(x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor, sign: float) -> Tensor:
    x, cos, sin = x_BSHA.contiguous(), cos_SA.contiguous(), sin_SA.contiguous()
    batch, sequence, heads, width = x.shape
    y = torch.empty_like(x)
    block = triton.next_power_of_2(width // 2)
    rows = min(rows_of_tile(block), triton.next_power_of_2(heads))
    grid = (batch * sequence, triton.cdiv(heads, rows))
    period = cos.numel() // width
    rotate_kernel[grid](x, cos, sin, y, sign, period, heads, width // 2, rows, block, num_warps=warps(rows * block))
    return y
