"""What a model will ask of the kernels, before it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moeport.core.dispatch_plan import DispatchPlan
from moeport.model.transformer import Transformer


def arguments_of(model: Transformer, module: nn.Module, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments without memory, by kernel, for those kernels whose limits depend on the sizes of a model.

    Args:
        model: its shapes.
        module: holds its parameters, of which the experts are those of this rank.
        dtype: compute type.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    config = model.config
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = empty(1, 1, heads, width), empty(1, 1, groups, width), empty(1, 1, groups, config.value_dim)
    rotated, tables = empty(1, 1, heads, config.rope_dim), empty(1, config.rope_dim)
    found: dict[str, tuple[Any, ...]] = {"attention": (q, k, v), "rope": (rotated, tables, tables)}
    parameters = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, w_in in parameters.items():
        if name.endswith("experts.w_in"):
            w_out = parameters[name.removesuffix("w_in") + "w_out"]
            counts = torch.empty(w_in[0], dtype=torch.int64, device="meta")
            weights = empty(*w_in), empty(*w_out)
            found["grouped_mlp"] = (empty(1, w_in[2]), *weights, counts, config.moe.activation)
            if w_in[0] == config.moe.num_experts:  # no rank has others
                plan = DispatchPlan(counts, counts, counts, counts, 1, 1, serves_every_row=True)
                found["routed_mlp"] = (empty(1, w_in[2]), empty(1), plan, *weights, config.moe.activation)
    return found
