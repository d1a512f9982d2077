"""The calls of torch-npu's operators, each after its contract check.

They are reached through `torch.ops.npu`, which exists where torch_npu is loaded, so nothing here imports it. Arguments
are named, and the overload is named too: a change of a schema is an error, never another meaning.
"""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from moeport.backends.torch.npu import contract
from moeport.backends.torch.npu.contract import check

OPERATORS = (
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_fusion_attention",
    "npu_swiglu",
    "npu_grouped_matmul",
    "npu_moe_token_permute",
    "npu_moe_token_unpermute",
)
"""The operators called here, in their default overload."""

_npu: Any = torch.ops.npu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the type of x; weight in that type or float32."""
    check("npu_rms_norm", contract.rms_norm(x, weight))
    return _npu.npu_rms_norm.default(x, weight, epsilon=eps)[0]


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-x_high, x_low) * sin. Args: x (B, S, H, A); cos and sin (1, S, 1, A) or (B, S, 1, A)."""
    check("npu_rotary_mul", contract.rotary_mul(x, cos, sin))
    return _npu.npu_rotary_mul.default(x, cos, sin, rotary_mode="half")


def swiglu(x: Tensor) -> Tensor:
    """silu of the first half of the last dimension, times the second half."""
    check("npu_swiglu", chain(contract.swiglu(x), contract.contiguous(x)))
    return _npu.npu_swiglu.default(x, dim=-1)


def fusion_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Scaled-dot-product attention. Args: q (B, S, H, A); k and v (B, S, G, A); mask, true: hidden: (2048, 2048), which
    stands for a causal one of any size, or (B, 1, S, S); None: every position sees all; scale multiplies the scores,
    None: 1 / sqrt(A).
    """
    options: dict[str, Any] = {
        "head_num": q.shape[2],
        "input_layout": "BSND",
        "atten_mask": mask,
        "sparse_mode": 0 if mask is None else contract.GIVEN if mask.dim() == 4 else contract.LEFT_UP,
    }
    check("npu_fusion_attention", contract.fusion_attention(q, k, v, **options))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _npu.npu_fusion_attention.default(q, k, v, **options, scale=scale)[0]


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, group_type: int) -> Tensor:
    """One product per group; `contract.grouped_matmul` says of what. It has no derivative of its own."""
    check("npu_grouped_matmul", contract.grouped_matmul(x, weight, counts, group_type=group_type))
    if _waits_anyway() and type(counts) is Tensor:
        check("npu_grouped_matmul", contract.group_sizes(counts.tolist(), x.shape[0 if group_type == 0 else 1]))
    options = {"group_list": counts, "split_item": 3, "group_type": group_type, "group_list_type": 1}
    return _npu.npu_grouped_matmul.default([x], [weight], **options)[0]


def token_permute(x: Tensor, indices: Tensor) -> Tensor:
    """The rows of x in ascending order of the indices. Args: x (T, D); indices (T, K). Returns (T K, D)."""
    check("npu_moe_token_permute", contract.token_permute(x, indices))
    return _npu.npu_moe_token_permute.default(x, indices)[0]


def token_unpermute(rows: Tensor, sorted_indices: Tensor, probs: Tensor) -> Tensor:
    """Each token's rows, weighted and summed.

    Args:
        rows: (N, D).
        sorted_indices: (N,), the row of each assignment: the inverse of the order in which they were sorted.
        probs: (T, K), of the type of the rows.
    """
    check("npu_moe_token_unpermute", contract.token_unpermute(rows, sorted_indices, probs))
    return _npu.npu_moe_token_unpermute.default(rows, sorted_indices, probs=probs)


def _waits_anyway() -> bool:
    """Whether every call waits for the device, so that values may be read from it."""
    return os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1" and not torch.compiler.is_compiling()
