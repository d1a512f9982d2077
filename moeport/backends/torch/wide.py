"""A product of narrow matrices whose result is in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_wide_products(x: Tensor) -> bool:
    """Whether torch multiplies matrices of this type and device into float32: on CUDA, from PyTorch 2.8."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.mm, "dtype")


class WideLinear(torch.autograd.Function):
    """x W^T in float32 from operands in the type of x. Args: x (T, I), weight (O, I) of any float type.

    The gradient of the result is rounded to the type of x, as in any product of that type; that of the weight, which is
    a sum over all tokens, comes out in float32. Not run on hardware.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Keeps x, and the weight as it is."""
        ctx.save_for_backward(x, weight)
        return wide_product(x, weight.to(x.dtype).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Two products in the type of x."""
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        by_x, by_weight = ctx.needs_input_grad
        return (
            grad @ weight.to(x.dtype) if by_x else None,
            wide_product(grad.t(), x).to(weight.dtype) if by_weight else None,
        )


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; where torch cannot do so, from operands in float32, which gives the same sums."""
    if has_wide_products(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
