"""npu_rotary_mul: x * cos + rotate(x) * sin."""

import torch

from tests.npu.emulation.fused.rules import FLOATS, emulated, need, need_types

ONE, SAME = 1, None
COSINES = {
    "half": {
        4: ((ONE, ONE, SAME), (SAME, ONE, SAME), (ONE, SAME, ONE), (SAME, SAME, ONE), (SAME, ONE, ONE), (SAME,) * 3),
        3: ((SAME, ONE), (SAME, SAME)),
    },
    "interleave": {4: ((ONE, ONE, SAME), (ONE, SAME, ONE), (SAME, ONE, ONE)), 3: ((SAME, ONE),)},
}
"""The shapes that cosines and sines may have in the layouts BNSD, BSND, SBND and TND, without the last dim, by mode and
by the number of dims: each size is 1 or the input's."""
MOST_WIDTH = 896
MOST_PAIRS = 1000


def rotary_mul(x, cos, sin, rotary_mode="half", rotate=None):
    _check(x, cos, sin, rotary_mode)
    emulated(rotate is None, "a matrix that rotates")
    return (x.float() * cos.float() + _rotate(x.float(), rotary_mode) * sin.float()).to(x.dtype)


def rotary_mul_backward(grad, x, cos, sin, rotary_mode="half"):
    dy = grad.float()
    d_x = dy * cos.float() - _rotate(dy * sin.float(), rotary_mode)  # the inverse of a quarter turn is its negative
    d_cos = (dy * x.float()).sum_to_size(cos.shape)
    d_sin = (dy * _rotate(x.float(), rotary_mode)).sum_to_size(sin.shape)
    return d_x.to(x.dtype), d_cos.to(cos.dtype), d_sin.to(sin.dtype)


def _rotate(x, mode):
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _check(x, cos, sin, mode):
    need(mode in COSINES, f"rotary_mode is half or interleave (got {mode})")
    need_types(FLOATS, input=x, r1=cos, r2=sin)
    need(x.dim() in (3, 4), f"the input has 3 or 4 dims (got {x.dim()})")
    need(x.shape[-1] % 2 == 0 and x.shape[-1] < MOST_WIDTH, f"the last dim is even and below {MOST_WIDTH}")
    need(cos.shape == sin.shape and cos.dim() == x.dim(), "r1 and r2 have one shape, with the dims of the input")
    need(cos.shape[-1] == x.shape[-1], f"r1 and r2 are as wide as the input (got {cos.shape[-1]}, {x.shape[-1]})")
    allowed = [
        shape
        for shape in COSINES[mode][x.dim()]
        if all(
            size == (has if want is SAME else ONE) for want, has, size in zip(shape, x.shape, cos.shape, strict=False)
        )
    ]
    need(allowed, f"r1 and r2 have a shape of one of the layouts (got {tuple(cos.shape)} for {tuple(x.shape)})")
    if mode == "interleave" and x.dim() == 4:
        sequence = allowed[0].index(SAME)
        pairs = x.shape[:-1].numel() // x.shape[sequence]
        need(pairs < MOST_PAIRS, f"batch times heads is below {MOST_PAIRS} (got {pairs})")


OPERATORS = {"npu_rotary_mul": rotary_mul, "npu_rotary_mul_backward": rotary_mul_backward}
