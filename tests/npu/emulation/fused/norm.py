"""npu_rms_norm: x / sqrt(mean(x^2) + epsilon) * gamma over the last dims, those of gamma."""

import torch

from tests.npu.emulation.fused.rules import FLOATS, need, need_types

PAIRS = {(kind, kind) for kind in FLOATS} | {(torch.float16, torch.float32), (torch.bfloat16, torch.float32)}


def rms_norm(x, gamma, epsilon=1e-6):
    need_types(FLOATS, input=x, gamma=gamma)
    need((x.dtype, gamma.dtype) in PAIRS, f"gamma has the type of the input or float32 (got {gamma.dtype}, {x.dtype})")
    need(0 < gamma.dim() <= x.dim(), "gamma has at most the dims of the input")
    need(
        x.shape[-gamma.dim() :] == gamma.shape, f"gamma is of the last dims of the input (got {gamma.shape}, {x.shape})"
    )
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(_dims(gamma), keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def rms_norm_backward(grad, x, gamma, rstd):
    normal, scaled = x.float() * rstd, grad.float() * gamma.float()
    d_x = rstd * (scaled - normal * (scaled * normal).mean(_dims(gamma), keepdim=True))
    d_gamma = (grad.float() * normal).sum(tuple(range(x.dim() - gamma.dim())))
    return d_x.to(x.dtype), d_gamma.reshape(gamma.shape)


def _dims(gamma):
    return tuple(range(-gamma.dim(), 0))


OPERATORS = {"npu_rms_norm": rms_norm, "npu_rms_norm_backward": rms_norm_backward}
