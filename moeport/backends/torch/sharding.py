"""Distributes a module over the ranks of a mesh with FSDP2, and converts between local and whole arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from moeport.backends.torch.module import ExpertsModule, TransformerModule
from moeport.comm.communicator import Communicator
from moeport.comm.mesh import Mesh
from moeport.core.parameters import ParameterSpec

UNEVEN = 1.125
"""How much larger than the mean the largest part of a parameter may be."""


def distribute(
    module: TransformerModule,
    mesh: Mesh,
    shard: bool,
    device: torch.device,
    dtype: torch.dtype,
    specs: Mapping[str, ParameterSpec],
) -> list[str]:
    """Apply `fully_shard`: experts over the ranks that hold the same ones, everything else over all ranks.

    A parameter is divided along its first dimension, or along another if only that gives all ranks about the same: few
    experts, over ranks that do not divide them.

    In a compute type narrower than the parameters, those of the blocks are gathered in it, and their gradients summed
    in the type of the parameters. Gathering in one type is for a whole block, so the few parameters that compute in
    float32, those of norms and routers, are not sharded then: each rank holds them whole. Embedding and head are
    gathered in float32, in which their gradients are summed over rows.

    Gradients are summed over ranks, not averaged: the scale of the loss includes the averaging, so that it is the same
    for parameters that see the tokens of all ranks and for those that see the tokens of one rank.

    Args:
        module: the model of this rank, with only its local experts, on the meta device.
        mesh: the ranks, at least two.
        shard: divide parameters, gradients and optimiser state; otherwise every rank keeps whole copies.
        device: device that it will be on.
        dtype: compute type.
        specs: all parameters by name.

    Returns: names of the parameters that every rank holds whole, whose gradients `sum_over_ranks` must add.
    """
    whole_on_all, policy = dict[str, nn.Parameter](), MixedPrecisionPolicy()
    if dtype.itemsize < next(module.parameters()).dtype.itemsize:
        in_blocks = module.layers.named_parameters("layers")
        whole_on_all = {name: p for name, p in in_blocks if not specs[name].in_compute_type}
        policy = MixedPrecisionPolicy(dtype, next(module.parameters()).dtype, cast_forward_inputs=False)
    all_ranks = _device_mesh(device, mesh.world.size, shard)
    experts = [part for part in module.modules() if isinstance(part, ExpertsModule)]
    unshared: set[nn.Parameter] = set()
    if mesh.copies.size == 1:
        unshared = {parameter for part in experts for parameter in part.parameters()}
    else:
        across_copies = _device_mesh(device, mesh.copies.size, shard, mesh.experts.size)
        for part in experts:
            fully_shard(part, mesh=across_copies, mp_policy=policy, shard_placement_fn=_placing(across_copies))
    ignored = unshared.union(whole_on_all.values())
    placing = _placing(all_ranks)
    for block in module.layers:
        fully_shard(block, mesh=all_ranks, mp_policy=policy, ignored_params=ignored, shard_placement_fn=placing)
    fully_shard(module, mesh=all_ranks, ignored_params=ignored, shard_placement_fn=placing)
    for method in ("logits", "token_losses", "read"):
        register_fsdp_forward_method(module, method)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return list(whole_on_all)


def _placing(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard]:
    """What says along which dimension a parameter is divided over the last axis of a mesh."""
    ranks = mesh.size(mesh.ndim - 1)
    return lambda parameter: Shard(shard_dim(tuple(parameter.shape), ranks))


def shard_dim(shape: tuple[int, ...], ranks: int) -> int:
    """The first dimension, unless the largest part would be much larger than the mean and another dimension divides.

    FSDP2 divides no other dimension than the first unevenly.
    """
    if -(-shape[0] // ranks) * ranks <= UNEVEN * shape[0]:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def sum_over_ranks(parameters: Sequence[nn.Parameter], world: Communicator) -> None:
    """Add the gradients of parameters over all ranks, each of which calls this, in one collective."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        total: Any = world.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _device_mesh(device: torch.device, size: int, shard: bool, parts: int = 1) -> DeviceMesh:
    """The axis of `size` ranks, spaced `parts` apart, to shard or to replicate over."""
    if shard:
        return init_device_mesh(device.type, (size, parts), mesh_dim_names=("shard", "part"))["shard"]
    names = ("replicate", "shard", "part")
    return init_device_mesh(device.type, (size, 1, parts), mesh_dim_names=names)["replicate", "shard"]


def local(x: Tensor) -> Tensor:
    """The local shard."""
    return x.detach().to_local() if isinstance(x, DTensor) else x


def from_local(x: Tensor, parameter: Tensor) -> Tensor:
    """The tensor of which `x` is the local shard, sharded like `parameter`."""
    if not isinstance(parameter, DTensor):
        return x
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def whole(x: Tensor) -> Tensor:
    """The whole tensor; every rank that holds a shard must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def to_whole(x: Tensor) -> np.ndarray:
    """The whole parameter, on the host; every rank that holds a shard must call it."""
    return whole(x).detach().cpu().numpy().copy()
