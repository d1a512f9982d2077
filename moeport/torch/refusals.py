"""What `moeport.torch.MoE` refuses, each in one sentence."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Proxy

from moeport.backends.torch.private import inside_vmap, is_exporting, is_replica
from moeport.errors import UserError

_WHY = "which tokens go to which expert depends on the data, and a captured graph would keep the example's rows"


def refuse_capture(x: Any) -> None:
    """Raise UserError where the layer is captured as a graph for use without Python."""
    if is_exporting():
        refuse("torch.export or ONNX export")
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        refuse("torch.jit.trace or ONNX export")
    if isinstance(x, Proxy):
        refuse("torch.fx.symbolic_trace")
    if inside_vmap():
        raise UserError(
            "moeport.torch.MoE cannot run under torch.vmap, since the rows of its experts differ between the mapped "
            "calls; call the layer once on the whole batch, or once per model in a loop"
        )


def refuse(what: str) -> NoReturn:
    """Raise the UserError for one way of capturing."""
    raise UserError(
        f"moeport.torch.MoE cannot be captured by {what}: {_WHY}; run the module itself or torch.compile(module), and "
        "save its state_dict"
    )


def refuse_replica(module: nn.Module) -> None:
    """Raise UserError in training under nn.DataParallel: what a replica measures never reaches the layer."""
    if is_replica(module) and module.training:
        raise UserError(
            "moeport.torch.MoE cannot train under nn.DataParallel, whose replicas lose the auxiliary loss and the load "
            "of the experts; use nn.parallel.DistributedDataParallel or fully_shard"
        )
