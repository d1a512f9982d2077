"""A module over the ranks of a mesh: FSDP2, and arrays of all ranks from those of each."""

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
    """Apply `fully_shard`: experts over the ranks that hold the same ones, all else over all ranks.

    Gradients are added over ranks: their mean is taken where the loss is, so that it is the same for what tokens of all
    ranks pass and what those of one rank pass.

    Args:
        module: on this rank, with its experts alone.
        mesh: the ranks, two or more.
        shard: divide parameters, gradients and optimiser state; else every rank keeps whole copies.
        device: of the module.
    """
    everywhere = _device_mesh(device, mesh.world.size, shard)
    experts = [part for part in module.modules() if isinstance(part, ExpertsModule)]
    alone: set[nn.Parameter] = set()
    if mesh.copies.size == 1:
        alone = {parameter for part in experts for parameter in part.parameters()}
    else:
        between_copies = _device_mesh(device, mesh.copies.size, shard, mesh.experts.size)
        for part in experts:
            fully_shard(part, mesh=between_copies)
    for block in module.layers:
        fully_shard(block, mesh=everywhere, ignored_params=alone)
    fully_shard(module, mesh=everywhere, ignored_params=alone)
    register_fsdp_forward_method(module, "logits")
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _device_mesh(device: torch.device, size: int, shard: bool, parts: int = 1) -> DeviceMesh:
    """The dimension of `size` ranks, each `parts` from the next, to shard over, or to replicate over."""
    if shard:
        return init_device_mesh(device.type, (size, parts), mesh_dim_names=("shard", "part"))["shard"]
    names = ("replicate", "shard", "part")
    return init_device_mesh(device.type, (size, 1, parts), mesh_dim_names=names)["replicate", "shard"]


def local(x: Tensor) -> Tensor:
    """What this rank holds."""
    return x.detach().to_local() if isinstance(x, DTensor) else x


def copies_of(x: Tensor) -> int:
    """Ranks that hold the same as this one."""
    if not isinstance(x, DTensor):
        return 1
    sizes = (x.device_mesh.size(dim) for dim, placement in enumerate(x.placements) if placement.is_replicate())
    return math.prod(sizes)


def with_shards(x: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of something as the whole of it, divided as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return x
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def to_whole(x: Tensor) -> np.ndarray:
    """A parameter with all its shards; every rank that holds one calls it."""
    full = x.full_tensor() if isinstance(x, DTensor) else x
    return full.detach().cpu().numpy().copy()


def like(x: Tensor, value: np.ndarray) -> Tensor:
    """A whole array as a tensor that is divided as `x` is, of its device and type."""
    tensor = torch.tensor(value, device=x.device, dtype=x.dtype)
    if not isinstance(x, DTensor):
        return tensor
    return distribute_tensor(tensor, x.device_mesh, x.placements, src_data_rank=None)
