"""RMSNorm and rotary embedding on CUDA by one Triton kernel each way. Not run on hardware."""

from __future__ import annotations

from torch import Tensor

from moeport.backends.torch.ops import TorchOps


def rms_norm(ops: TorchOps, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `moeport.core.ops.Ops.rms_norm`."""
    from moeport.backends.torch.cuda.triton.rms_norm import RMSNorm

    return RMSNorm.apply(x, weight, eps)


def rms_norm_limit(x: Tensor, weight: Tensor, eps: float) -> str | None:
    """A program keeps a row in its registers."""
    return f"rows have the width {x.shape[-1]}; expected up to 8192" if x.shape[-1] > 8192 else None


def rope(ops: TorchOps, x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
    """As `moeport.core.ops.Ops.rope`."""
    from moeport.backends.torch.cuda.triton.rope import Rope

    return Rope.apply(x_BSHA, cos_SA, sin_SA)


def rope_limit(x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> str | None:
    """As for `rms_norm`."""
    return f"heads have the width {x_BSHA.shape[-1]}; expected up to 8192" if x_BSHA.shape[-1] > 8192 else None
