"""npu_swiglu: silu(a) * b of the halves a and b of the input."""

import torch
import torch.nn.functional as F

from tests.npu.emulation.fused.rules import need, need_one_type


def swiglu(x, dim=-1):
    need_one_type(input=x)
    need(x.is_contiguous(), "the input is contiguous")
    need(x.numel(), "the input is not empty")
    need(x.shape[dim] % 2 == 0, f"dim {dim} can be halved (got {tuple(x.shape)})")
    a, b = x.float().chunk(2, dim)
    return (F.silu(a) * b).to(x.dtype)


def swiglu_backward(grad, x, dim=-1):
    a, b = x.float().chunk(2, dim)
    gate = torch.sigmoid(a)
    d_a = grad.float() * b * gate * (1 + a * (1 - gate))
    return torch.cat([d_a, grad.float() * a * gate], dim).to(x.dtype)


OPERATORS = {"npu_swiglu": swiglu, "npu_swiglu_backward": swiglu_backward}
