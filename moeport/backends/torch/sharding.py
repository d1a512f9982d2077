"""Distributes a module over the ranks of a mesh with FSDP2, and converts between local and whole arrays."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from moeport.backends.torch.module import ExpertsModule, TransformerModule
from moeport.comm.mesh import Mesh


def distribute(module: TransformerModule, mesh: Mesh, shard: bool, device: torch.device) -> None:
    """Apply `fully_shard`: experts over the ranks that hold the same ones, everything else over all ranks.

    Gradients are summed over ranks, not averaged: the scale of the loss includes the averaging, so that it is the same
    for parameters that see the tokens of all ranks and for those that see the tokens of one rank.

    Args:
        module: the model of this rank, with only its local experts.
        mesh: the ranks, at least two.
        shard: divide parameters, gradients and optimiser state; otherwise every rank keeps whole copies.
        device: device of the module.
    """
    all_ranks = _device_mesh(device, mesh.world.size, shard)
    experts = [part for part in module.modules() if isinstance(part, ExpertsModule)]
    unshared: set[nn.Parameter] = set()
    if mesh.copies.size == 1:
        unshared = {parameter for part in experts for parameter in part.parameters()}
    else:
        across_copies = _device_mesh(device, mesh.copies.size, shard, mesh.experts.size)
        for part in experts:
            fully_shard(part, mesh=across_copies)
    for block in module.layers:
        fully_shard(block, mesh=all_ranks, ignored_params=unshared)
    fully_shard(module, mesh=all_ranks, ignored_params=unshared)
    register_fsdp_forward_method(module, "logits")
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _device_mesh(device: torch.device, size: int, shard: bool, parts: int = 1) -> DeviceMesh:
    """The axis of `size` ranks, spaced `parts` apart, to shard or to replicate over."""
    if shard:
        return init_device_mesh(device.type, (size, parts), mesh_dim_names=("shard", "part"))["shard"]
    names = ("replicate", "shard", "part")
    return init_device_mesh(device.type, (size, 1, parts), mesh_dim_names=names)["replicate", "shard"]


def local(x: Tensor) -> Tensor:
    """The local shard."""
    return x.detach().to_local() if isinstance(x, DTensor) else x


def num_copies(x: Tensor) -> int:
    """Number of ranks that hold the same shard."""
    if not isinstance(x, DTensor):
        return 1
    sizes = (x.device_mesh.size(dim) for dim, placement in enumerate(x.placements) if placement.is_replicate())
    return math.prod(sizes)


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


def sharded_like(x: Tensor, value: np.ndarray) -> Tensor:
    """A whole array as a tensor with the sharding, device and type of `x`."""
    tensor = torch.tensor(value, device=x.device, dtype=x.dtype)
    if not isinstance(x, DTensor):
        return tensor
    return distribute_tensor(tensor, x.device_mesh, x.placements, src_data_rank=None)
