"""The activations of experts in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def derivatives(first, second, GATED: tl.constexpr):
    """SwiGLU of gate and up, or GELU of the first, in float32: the value, and its derivatives by first and second."""
    if GATED:
        sigmoid = tl.sigmoid(first)
        silu = first * sigmoid
        value, by_first, by_second = silu * second, second * (sigmoid + silu * (1 - sigmoid)), silu
    else:
        below = 0.5 * (1 + tl.erf(first * 0.7071067811865476))  # of a standard normal
        value, by_first, by_second = (
            first * below,
            below + first * tl.exp(-0.5 * first * first) * 0.3989422804014327,
            first,
        )
    return value, by_first, by_second
