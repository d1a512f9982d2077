"""Names what computes each kernel on a device."""

from __future__ import annotations

import torch

from moeport.backends.torch.adamw_trial import ADAMW
from moeport.backends.torch.fused import FusedOps
from moeport.backends.torch.ops import DTYPES, TorchOps
from moeport.backends.torch.optimizer import FUSED_DEVICES
from moeport.backends.torch.sorting import KEYED
from moeport.backends.torch.wide import has_wide_products


def kernel_choices(ops: TorchOps, dtype: str) -> dict[str, str]:
    """For each kernel of `Ops`, and the step of AdamW, the implementation used in a compute type and why."""
    cpu, keyed = ops.device.type == "cpu", ops.device.type in KEYED
    wide = has_wide_products(torch.zeros(1, device=ops.device, dtype=DTYPES[dtype]))
    composed = {
        "linear": "torch.nn.functional.linear",
        "linear_accurate": "torch.mm with a result in float32" if wide else "default composition of linear and a cast",
        "rms_norm": "one autograd node, few passes over memory" if cpu else "torch.nn.functional.rms_norm",
        "rope": "rolled halves and addcmul",
        "attention": "torch.nn.functional.scaled_dot_product_attention",
        "cached_attention": "torch.nn.functional.scaled_dot_product_attention with a mask; writes into the cache",
        "swiglu": "silu, then multiply",
        "gelu": "torch.nn.functional.gelu",
        "mlp": "default composition of linear and activation",
        "grouped_mlp": _grouped_mlp(ops, dtype),
        "inverse": "scatter" if keyed else "default composition",
        "sort_by_group": _sort_by_group(ops),
        "permute": "gather, with a gathering gradient",
        "unpermute": "gather and weighted sum, with a gathering gradient",
        "routed_mlp": "default composition of permute, grouped_mlp and unpermute",
        "cross_entropy": "default composition",
        "linear_cross_entropy": "blocks of rows, gradients in the forward pass; the full logits never exist",
        "linear_cross_entropy_by_token": "as linear_cross_entropy",
        ADAMW: "torch.optim.AdamW, fused" if ops.device.type in FUSED_DEVICES else "torch.optim.AdamW, not fused",
    }
    return ops.describe(composed, dtype) if isinstance(ops, FusedOps) else composed


def _sort_by_group(ops: TorchOps) -> str:
    if ops.device.type not in KEYED:
        return "default composition: two sorts"
    return f"one stable sort of keys of 8 or 16 bits{', by numpy' if ops.device.type == 'cpu' else ''}, and a scatter"


def _grouped_mlp(ops: TorchOps, dtype: str) -> str:
    if ops.uses_grouped_mm(torch.zeros(1, device=ops.device, dtype=DTYPES[dtype])):
        return "torch.nn.functional.grouped_mm if widths are multiples of 8 (bfloat16, compute capability 9.0)"
    needs = " (grouped_mm needs bfloat16 and compute capability 9.0)" if ops.device.type == "cuda" else ""
    return "one product per expert in one autograd node" + needs
