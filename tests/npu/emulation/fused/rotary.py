"""npu_rotary_mul: x * cos + rotate(x) * sin."""

import math

import torch

from tests.npu.emulation.fused.rules import FLOATS, emulated, need, need_types

Layouts = dict[tuple, tuple[int, ...]]
ONE, SAME = 1, None
FOR_ALL: Layouts = {(ONE, ONE, SAME): (2,), (ONE, SAME, ONE): (1,), (SAME, ONE, ONE): (0,)}
FOR_EACH: Layouts = {
    (SAME, ONE, SAME): (2,),
    (SAME, SAME, ONE): (0, 1),
    (SAME, SAME, SAME): (0, 1, 2),
}
COSINES: dict[str, dict[int, Layouts]] = {
    "half": {4: FOR_ALL | FOR_EACH, 3: {(SAME, ONE): (0,), (SAME, SAME): (0,)}},
    "interleave": {4: FOR_ALL, 3: {(SAME, ONE): (0,)}},
}
"""The shapes that cosines and sines may have in the layouts BNSD, BSND, SBND and TND, without the last dim, by mode and
by the number of dims: each size is 1 or the input's. For each, the dims that may be the positions."""
WIDTH_LIMIT = 896
LIMIT = 1000
"""Batch and heads are below it; in mode interleave their product is."""


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
    need(x.shape[-1] % 2 == 0 and x.shape[-1] < WIDTH_LIMIT, f"the last dim is even and below {WIDTH_LIMIT}")
    need(cos.shape == sin.shape and cos.dim() == x.dim(), "r1 and r2 have one shape, with the dims of the input")
    need(cos.shape[-1] == x.shape[-1], f"r1 and r2 are as wide as the input (got {cos.shape[-1]}, {x.shape[-1]})")
    positions = [
        dim
        for shape, dims in COSINES[mode][x.dim()].items()
        if all(
            size == (has if want is SAME else ONE) for want, has, size in zip(shape, x.shape, cos.shape, strict=False)
        )
        for dim in dims
    ]
    need(positions, f"r1 and r2 have a shape of one of the layouts (got {tuple(cos.shape)} for {tuple(x.shape)})")
    if x.dim() == 4:
        others = [[size for dim, size in enumerate(x.shape[:3]) if dim != position] for position in positions]
        sizes = [max(each) if mode == "half" else math.prod(each) for each in others]
        need(min(sizes) < LIMIT, f"batch and heads, or in mode interleave their product, are below {LIMIT}")


OPERATORS = {"npu_rotary_mul": rotary_mul, "npu_rotary_mul_backward": rotary_mul_backward}
