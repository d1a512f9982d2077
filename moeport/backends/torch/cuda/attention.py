"""Attention on CUDA by kernels that scaled_dot_product_attention does not choose by itself. Not run on hardware.

The FLOPs of causal attention are 2 B H S^2 A forward and 5 B H S^2 A backward, half of those without a mask; it must
read and write q, k, v, the output and their gradients once. Keys and values of grouped heads are read as they are,
except by `sdpa_efficient`, whose kernel has no grouped heads.
"""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moeport.backends.torch.ops import TorchOps
from moeport.core.ops import CAUSAL, AttentionOptions

NOT_DETERMINISTIC = "its gradient is not deterministic; expected backend.deterministic: false"
MASKED = "documents are masked (data.document_mask)"


def flash_attention_3(
    ops: TorchOps,
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> Tensor:
    """FlashAttention-3 of the package flash-attn-3, in the layout of the arguments, so that nothing is transposed.

    Its gradient is deterministic where PyTorch's switch asks for it.
    """
    attend = import_module("flash_attn_interface").flash_attn_func
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = attend(
        q_BSHA, k_BSGA, v_BSGW, causal=options.causal, softmax_scale=options.scale, deterministic=deterministic
    )
    return out[0] if isinstance(out, tuple) else out  # some releases also return the log-partition


def flash_attention_3_limit(
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> str | None:
    """Of flash-attn-3; its deterministic gradient lacks the widest heads."""
    if options.document_BS is not None:
        return MASKED
    most = 192 if torch.are_deterministic_algorithms_enabled() else 256
    return _width_fault(q_BSHA, v_BSGW, most)


def cudnn(
    ops: TorchOps,
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> Tensor:
    """cuDNN's attention, in training only: it makes a plan for each length, and the lengths of generation vary."""
    if not torch.is_grad_enabled():
        return TorchOps.attention(ops, q_BSHA, k_BSGA, v_BSGW, options)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return TorchOps.attention(ops, q_BSHA, k_BSGA, v_BSGW, options)


def cudnn_limit(
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> str | None:
    """Of cuDNN, as PyTorch calls it: its gradient is not deterministic, so PyTorch refuses it where that is asked."""
    if options.document_BS is not None:
        return MASKED
    if torch.are_deterministic_algorithms_enabled():
        return NOT_DETERMINISTIC
    return _width_fault(q_BSHA, v_BSGW, 128)


def efficient(
    ops: TorchOps,
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> Tensor:
    """The memory-efficient kernel for grouped heads in float32, for which PyTorch alone would make all S x S scores.

    It has no grouped heads, so each key and value is repeated for its query heads; their gradients are sums over them.
    """
    repeats = q_BSHA.shape[2] // k_BSGA.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BSHA, k_BSGA, v_BSGW))
    k, v = (x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (k, v))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=options.causal, scale=options.scale)
    return out.transpose(1, 2)


def efficient_limit(
    q_BSHA: Tensor,
    k_BSGA: Tensor,
    v_BSGW: Tensor,
    options: AttentionOptions = CAUSAL,
) -> str | None:
    """Without grouped heads PyTorch chooses this kernel by itself, and under a mask the composition has it too."""
    if options.document_BS is not None:
        return MASKED
    return "heads are not grouped" if q_BSHA.shape[2] == k_BSGA.shape[2] else None


def _width_fault(q_BSHA: Tensor, v_BSGW: Tensor, most: int) -> str | None:
    width, value_width = q_BSHA.shape[-1], v_BSGW.shape[-1]
    if width != value_width:
        return f"values have the width {value_width}, and queries and keys {width}; expected the same"
    if width % 8 or width > most:
        return f"heads have the width {width}; expected a multiple of 8 up to {most}"
    return None
